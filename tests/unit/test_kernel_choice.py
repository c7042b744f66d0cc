"""Which kernels a process computes with, and what `outcrop check` says about it."""

import pytest

from actors.kernels import native, packed
from cluster.messages.actors import KernelChoice


@pytest.fixture(autouse=True)
def restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed.Kernels, "choice", "auto")
    monkeypatch.setattr(packed.Kernels, "experts", "auto")


@pytest.mark.parametrize(
    ("choice", "has_bfloat16", "sets", "native_is_used", "told"),
    [
        ("auto", False, {"avx2": 0}, True, "native, avx2: oneDNN finds no bfloat16 instructions here"),
        ("auto", True, {"avx2": 0, "amx_bf16": 2}, False, "oneDNN: this CPU has bfloat16 instructions"),
        ("native", True, {"avx2": 0, "amx_bf16": 2}, True, "native, amx_bf16"),
        ("torch", False, {"avx2": 0}, False, "torch, slow: as chosen"),
        ("auto", False, {}, False, "torch, slow: "),
    ],
)
def test_what_is_used_and_why(
    monkeypatch: pytest.MonkeyPatch,
    choice: KernelChoice,
    has_bfloat16: bool,
    sets: dict[str, int],
    native_is_used: bool,
    told: str,
) -> None:
    monkeypatch.setattr(packed, "has_bfloat16", lambda: has_bfloat16)
    monkeypatch.setattr(native, "instruction_sets", lambda: sets)
    packed.Kernels.choose(choice)
    assert packed.use_native() == native_is_used
    assert packed.describe().startswith(told)


def test_int8_experts_are_native_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN has no say there: in torch, int8 is the way for machines without our kernels."""
    monkeypatch.setattr(packed, "has_bfloat16", lambda: True)
    monkeypatch.setattr(native, "instruction_sets", lambda: {"avx2": 0, "avx512_bf16": 1})
    packed.Kernels.choose("auto", "int8")
    assert packed.describe_int8() == "native, avx512_bf16"
    packed.Kernels.choose("torch", "int8")
    assert packed.describe_int8() == "torch: as chosen"


def test_what_was_asked_for_and_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "instruction_sets", dict)
    with pytest.raises(RuntimeError, match=r"kernels='native': .*: choose auto or torch"):
        packed.Kernels.choose("native")
