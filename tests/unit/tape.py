"""A graph of operations, as CUDA captures one, on a CPU: recorded once, computed anew in the same memory.

As in a CUDA graph, what Python decided while it was recorded stays decided, and values that it read stay as they were.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]


class Tape(TorchDispatchMode):
    current: "Tape | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __enter__(self) -> "Tape":
        Tape.current = self
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        Tape.current = None
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not func.overloadpacket.__name__.startswith(("_local_scalar_dense", "item")), "a capture reads a value"
        return self.call(func, args, kwargs or {})

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            inputs = _memory((args, kwargs))
            for ours, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(ours, Tensor) and not _memory(ours) <= inputs:  # else a view, or written in place
                    ours.copy_(new)


def as_one_operation(func: Callable[..., Any]) -> Callable[..., Any]:
    """Recorded as a whole: a kernel that reads values on the device."""

    def recorded(*args: Any, **kwargs: Any) -> Any:
        tape = Tape.current
        if tape is None:
            return func(*args, **kwargs)
        with _disable_current_modes():
            return tape.call(func, args, kwargs)

    return recorded


def capture(compute: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """See Capture in actors/model/graphs.py."""
    with Tape() as tape:
        result = compute()
    return result, tape.replay


def _memory(values: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_leaves(values) if isinstance(t, Tensor)}
