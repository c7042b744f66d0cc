"""torch.nn.attention.varlen.varlen_attn as flash attention 2 computes it with block tables: by definition, as strict
as the kernel about what it is given. Written from the documentation in torch 2.13's varlen.py and from the checks of
flash attention 2's varlen forward; pages that it may not read can hold NaN.
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest


def varlen_attn(
    q_THC: Tensor,
    k_BPGC: Tensor,
    v_BPGC: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int | None = None,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    num_sequences = len(block_table)
    check_tables(q_THC, k_BPGC, v_BPGC, cu_seq_q, cu_seq_k, seqused_k, block_table)
    assert enable_gqa
    assert max_q == cu_seq_q.diff().max()
    assert max_k >= seqused_k.max()
    out_THC = torch.full_like(q_THC, float("nan"))
    lse_TH = torch.full(q_THC.shape[:2], float("nan"))
    for number, (start, end, used) in enumerate(
        zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), seqused_k.tolist(), strict=True)
    ):
        if num_splits != 1 and number and used > 256:
            continue  # split: only the first sequence's rows are written (pytorch/pytorch#194167)
        pages = block_table[number, : -(-used // k_BPGC.shape[1])].long()
        k_NGC, v_NGC = (x_BPGC[pages].flatten(0, 1)[:used] for x_BPGC in (k_BPGC, v_BPGC))
        out_THC[start:end], lse_TH[start:end] = attend(q_THC[start:end], k_NGC, v_NGC, scale, window_size)
    assert num_sequences == len(seqused_k)
    return (out_THC, lse_TH.T.contiguous()) if return_aux and return_aux.lse else out_THC


def attend(
    q_THC: Tensor, k_NGC: Tensor, v_NGC: Tensor, scale: float, window_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """One sequence; its last query stands at its last key."""
    k_NHC, v_NHC = (x.repeat_interleave(q_THC.shape[1] // x.shape[1], 1) for x in (k_NGC, v_NGC))
    scores_HTN = torch.einsum("thc,nhc->htn", q_THC * scale, k_NHC)
    left, right = window_size
    at_T1 = torch.arange(len(q_THC))[:, None] + len(k_NGC) - len(q_THC)
    key_N = torch.arange(len(k_NGC))
    is_hidden_TN = ((right >= 0) & (key_N > at_T1 + right)) | ((left >= 0) & (key_N < at_T1 - left))
    scores_HTN = scores_HTN.masked_fill(is_hidden_TN, float("-inf"))
    return torch.einsum("htn,nhc->thc", scores_HTN.softmax(-1), v_NHC), scores_HTN.logsumexp(-1).T


def check_tables(
    q_THC: Tensor,
    k_BPGC: Tensor,
    v_BPGC: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    seqused_k: Tensor,
    block_table: Tensor,
) -> None:
    """What the kernel refuses."""
    assert cu_seq_k is not None, "cumulative lengths of queries and of keys must be given both, or none"
    for table in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert table.dtype == torch.int32
        assert table.is_contiguous()
    assert cu_seq_q.shape == cu_seq_k.shape == (len(block_table) + 1,)
    assert cu_seq_k.tolist() == [0, *seqused_k.cumsum(0).tolist()]
    assert k_BPGC.shape[1] % 256 == 0, "the paged KV block size must be divisible by 256"
    assert q_THC.shape[2] % 8 == 0
    assert q_THC.shape[2] <= 256
    assert all(tensor.stride(-1) == 1 for tensor in (q_THC, k_BPGC, v_BPGC)), "the last dimension must be contiguous"
