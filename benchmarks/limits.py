"""A roofline (Williams, Waterman, Patterson, 2009): what the machine can do at all, and what a step must do at least.

A step must read the weights that it needs once, and its sequences' keys and values, and multiply. It can't take less
than the longer of the two, at the speed of a plain parallel read and of a large product (in bfloat16
where the CPU multiplies it).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.models.spec import ModelSpec

READ_BYTES = 32 * 3 * 1024 * 512 * 2  # the experts of a layer of 1b-a400m: more than caches hold
MATMUL = 2048


@dataclass(frozen=True, slots=True)
class Cost:
    num_bytes: float
    flops: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.num_bytes + other.num_bytes, self.flops + other.flops)

    def times(self, number: int) -> "Cost":
        return Cost(number * self.num_bytes, number * self.flops)


@dataclass(frozen=True, slots=True)
class Limits:
    bytes_per_second: float
    flops_per_second: float

    def seconds(self, cost: Cost) -> float:
        return max(cost.num_bytes / self.bytes_per_second, cost.flops / self.flops_per_second)


class Gauge:
    """Measures the limits anew at each call, so that they can take turns with what is compared with them."""

    def __init__(self, threads: int) -> None:
        import torch

        from actors.compute import has_bfloat16
        from actors.kernels import native

        # In the type that the CPU multiplies fastest: bfloat16 instructions are faster than any float32 product.
        square = torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16 if has_bfloat16() else torch.float32)
        self._product: Callable[[], object] = lambda: square @ square
        lib = native.library()
        memory = native.memory(READ_BYTES).zero_() if lib else torch.zeros(READ_BYTES // 8, dtype=torch.int64)
        # Without our library, a sum: bound by memory as well, if not as closely.
        self._read: Callable[[], object] = (
            (lambda: lib.outcrop_read(threads, memory.data_ptr(), READ_BYTES)) if lib else memory.sum
        )

        self._measured: list[Limits] = []

    def measure(self) -> Limits:
        limits = Limits(READ_BYTES / _seconds(self._read), 2 * MATMUL**3 / _seconds(self._product))
        self._measured.append(limits)
        return limits

    @property
    def median(self) -> Limits:
        """Of all measurements."""
        return Limits(
            statistics.median(each.bytes_per_second for each in self._measured),
            statistics.median(each.flops_per_second for each in self._measured),
        )


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def experts_cost(spec: ModelSpec, num_tokens: int, num_touched: float, itemsize: int) -> Cost:
    """Experts of a layer, of which `num_touched` have tokens."""
    expert = 3 * spec.hidden_size * spec.expert_size
    return Cost(num_touched * expert * itemsize, 2 * num_tokens * spec.top_k * expert)


def step_cost(
    spec: ModelSpec, lengths: list[tuple[int, int]], itemsize: int, expert_itemsize: int | None = None
) -> Cost:
    """A step of sequences with (new tokens, context with them), one row of logits each; experts chosen evenly. Windows
    of layers are left out: with them a step could be faster.
    """
    num_tokens, num_experts = sum(new for new, _ in lengths), spec.num_experts
    queries, keys = (n * spec.head_dim for n in (spec.num_heads, spec.num_kv_heads))
    dense = spec.hidden_size * (2 * queries + 2 * keys + num_experts)
    touched = num_experts * (1 - (1 - spec.top_k / num_experts) ** num_tokens)
    read = sum(context for _, context in lengths)
    pairs = sum(new * (context - (new - 1) / 2) for new, context in lengths)  # of a query and a key
    moe = experts_cost(spec, num_tokens, touched, expert_itemsize or itemsize)
    attention = Cost((dense + 2 * read * keys) * itemsize, 2 * num_tokens * dense + 4 * pairs * queries)
    head = spec.vocab_size * spec.hidden_size
    mlps = (
        3
        * spec.hidden_size
        * (spec.num_expert_layers * spec.shared_size + (spec.num_layers - spec.num_expert_layers) * spec.dense_size)
    )
    rest = Cost((head + mlps) * itemsize, 2 * len(lengths) * head + 2 * num_tokens * mlps)
    return moe.times(spec.num_expert_layers) + attention.times(spec.num_layers) + rest
