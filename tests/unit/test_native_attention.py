"""The native attention kernel against float32 torch, over a cache whose other slots are not numbers."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.kernels import native
from actors.kernels.native import NativeLinear, attend_singles

pytestmark = pytest.mark.skipif(
    not native.instruction_sets(), reason="the native kernels have not been built, or this CPU has no AVX2"
)
SCALE = 0.125


def paged(contexts: list[int], block_size: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, P, G, C] of sequences whose blocks lie in each other's midst, and which block is whose."""
    generator = torch.Generator().manual_seed(sum(contexts))
    counts = [-(-context // block_size) for context in contexts]
    numbers = torch.randperm(sum(counts) + 3, generator=generator, dtype=torch.int32)
    blocks = torch.zeros(len(contexts), max(counts), dtype=torch.int32)
    k, v = torch.full((2, len(numbers), block_size, heads, head_dim), float("nan")).bfloat16()
    for row, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        blocks[row, :count], numbers = numbers[:count], numbers[count:]
        for token in range(context):
            place = int(blocks[row, token // block_size]), token % block_size
            k[place], v[place] = torch.randn(2, heads, head_dim, generator=generator).bfloat16()
    return k, v, blocks


def by_definition(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, contexts: list[int]) -> Tensor:
    out = []
    for row, context in enumerate(contexts):
        keys, values = (x[blocks[row].long()].flatten(0, 1)[:context].float().transpose(0, 1) for x in (k, v))
        q_H1C = q[row].float()[:, None]
        out.append(F.scaled_dot_product_attention(q_H1C, keys, values, scale=SCALE, enable_gqa=True)[:, 0])
    return torch.stack(out)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, contexts: list[int]) -> Tensor:
    out = q.new_full(q.shape, float("nan"))
    attend_singles(q, k, v, blocks, torch.tensor(contexts), SCALE, out)
    return out


@given(
    contexts=st.lists(st.integers(1, 200), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 3, 16, 256]),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 4),
    head_dim=st.sampled_from([8, 24, 32, 64, 72, 128]),
    sharpness=st.sampled_from([1.0, 100.0]),
)
@settings(max_examples=80, deadline=None)
def test_attention(
    contexts: list[int], block_size: int, kv_heads: int, shared: int, head_dim: int, sharpness: float
) -> None:
    k, v, blocks = paged(contexts, block_size, kv_heads, head_dim)
    both = torch.randn(len(contexts), kv_heads * shared + 1, head_dim).mul_(sharpness).bfloat16()
    q = both[:, :-1]  # as in the model: rows are further apart than they are long
    torch.testing.assert_close(
        attend(q, k, v, blocks, contexts).float(), by_definition(q, k, v, blocks, contexts), atol=0.01, rtol=0.01
    )


def test_a_sequence_is_computed_alike_whatever_is_computed_with_it() -> None:
    contexts = [130, 1, 64, 65, 7]
    k, v, blocks = paged(contexts, 16, 2, 64)
    q = torch.randn(5, 4, 64).bfloat16()
    alone = [attend(q[i : i + 1], k, v, blocks[i : i + 1], contexts[i : i + 1]) for i in range(5)]
    assert attend(q, k, v, blocks, contexts).equal(torch.cat(alone))


def test_a_forked_child_computes_as_its_parent_does() -> None:
    """fork() takes the pool's memory along, not its threads."""
    weight, x = torch.randn(256, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    linear = NativeLinear(native.pack(weight), 256, None, native.fastest())
    expected, before = linear(x), torch.get_num_threads()
    torch.set_num_threads(2)
    linear(x)  # now there is a thread
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a child that waits for threads it has not
        signal.alarm(20)
        os._exit(0 if linear(x).equal(expected) else 1)
    torch.set_num_threads(before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
