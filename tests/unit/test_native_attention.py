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
from actors.kernels.front_layer import NativeBatch, attend
from actors.kernels.native import NativeLinear
from tests.unit.test_native import EXAMPLES, isa  # noqa: F401 - a fixture

SCALE = 0.125
# (new tokens, tokens in the cache with them)
Lengths = list[tuple[int, int]]


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


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, lengths: Lengths, window: int | None, sinks_H: Tensor | None
) -> Tensor:
    """With sinks, as the reference: the attention times sigmoid(logsumexp(scores) - sink)."""
    out, start = [], 0
    for row, (new, context) in enumerate(lengths):
        keys, values = (x[blocks[row].long()].flatten(0, 1)[:context].float().transpose(0, 1) for x in (k, v))
        q_HTC = q[start : start + new].transpose(0, 1)
        mask = torch.ones(new, context, dtype=torch.bool).tril(context - new)
        if window:
            mask = mask.triu(context - new - window + 1)
        attended = F.scaled_dot_product_attention(q_HTC, keys, values, attn_mask=mask, scale=SCALE, enable_gqa=True)
        if sinks_H is not None:
            scores = q_HTC @ keys.repeat_interleave(len(q_HTC) // len(keys), 0).transpose(1, 2) * SCALE
            lse_HT = scores.masked_fill(~mask, float("-inf")).logsumexp(-1)
            attended = attended * (lse_HT - sinks_H.float()[:, None]).sigmoid()[..., None]
        out.append(attended.transpose(0, 1))
        start += new
    return torch.cat(out)


def attend_native(
    isa: int,  # noqa: F811
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    lengths: Lengths,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    starts = torch.tensor([0, *(new for new, _ in lengths)]).cumsum(0)
    contexts = torch.tensor([context for _, context in lengths])
    batch = NativeBatch(torch.zeros(len(q), dtype=torch.int64), starts, contexts, blocks, None, k.shape[1])
    return attend(batch, q, k, v, SCALE, isa, window, sinks_H)


def queries(lengths: Lengths, heads: int, head_dim: int, sharpness: float = 1.0) -> Tensor:
    """Rounded: with instructions for bfloat16, queries of prompts are."""
    num_tokens = sum(new for new, _ in lengths)
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, heads, head_dim, generator=generator).mul_(sharpness).bfloat16().float()


@given(
    lengths=st.lists(st.tuples(st.integers(1, 150), st.integers(0, 100)), min_size=1, max_size=4),
    num_single=st.integers(0, 4),
    block_size=st.sampled_from([1, 3, 16, 256]),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 4),
    head_dim=st.sampled_from([8, 24, 32, 64, 72, 128]),
    sharpness=st.sampled_from([1.0, 30.0]),
    window=st.sampled_from([None, 1, 7, 64, 100, 1000]),
    has_sinks=st.booleans(),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_attention(
    isa: int,  # noqa: F811
    lengths: Lengths,
    num_single: int,
    block_size: int,
    kv_heads: int,
    shared: int,
    head_dim: int,
    sharpness: float,
    window: int | None,
    has_sinks: bool,
) -> None:
    lengths = [(1 if row < num_single else new, new + before) for row, (new, before) in enumerate(lengths)]
    k, v, blocks = paged([context for _, context in lengths], block_size, kv_heads, head_dim)
    q = queries(lengths, kv_heads * shared, head_dim, sharpness)
    sinks_H = torch.linspace(-4, 9, kv_heads * shared).bfloat16() if has_sinks else None
    args = q, k, v, blocks, lengths, window, sinks_H
    actual, expected = attend_native(isa, *args), by_definition(*args)
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.01)


def test_a_sequence_is_computed_alike_whatever_is_computed_with_it(isa: int) -> None:  # noqa: F811
    lengths = [(1, 130), (1, 1), (1, 64), (70, 70), (9, 65), (2, 7)]
    k, v, blocks = paged([context for _, context in lengths], 16, 2, 64)
    parts = queries(lengths, 4, 64).split([new for new, _ in lengths])
    alone = [attend_native(isa, parts[i], k, v, blocks[i : i + 1], lengths[i : i + 1]) for i in range(len(lengths))]
    assert attend_native(isa, torch.cat(parts), k, v, blocks, lengths).equal(torch.cat(alone))


@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("cut", [2, 63, 64, 65, 129, 178])
def test_a_prompt_is_computed_alike_wherever_it_is_cut(isa: int, cut: int, window: int | None) -> None:  # noqa: F811
    k, v, blocks = paged([180], 16, 2, 64)
    q = queries([(180, 180)], 6, 64)
    whole = attend_native(isa, q, k, v, blocks, [(180, 180)], window)
    first = attend_native(isa, q[:cut], k, v, blocks, [(cut, cut)], window)
    assert torch.cat((first, attend_native(isa, q[cut:], k, v, blocks, [(180 - cut, 180)], window))).equal(whole)


def test_a_forked_child_computes_as_its_parent_does() -> None:
    """fork() takes the pool's memory along, not its threads."""
    if not native.instruction_sets():
        pytest.skip("the native kernels have not been built, or this CPU has no AVX2")
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
