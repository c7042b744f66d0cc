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

from cluster.planning.cost import Cost

READ_BYTES = 32 * 3 * 1024 * 512 * 2  # the experts of a layer of 1b-a400m: more than caches hold
MATMUL = 2048


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
