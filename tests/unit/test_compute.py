"""What an actor computes with, and what `outcrop check` says about it."""

from typing import Any

import pytest
import torch

from actors import compute as compute_module
from actors.compute import Compute, describe
from actors.kernels import native
from cluster.errors import ConfigError, ModelError
from cluster.messages.actors import ExpertDtype, KernelChoice
from tests.checkpoints import GRANITEMOE
from tests.specs import spec_of

AVX2_TESTED, AVX512_TESTED = "native, avx2 (tested on hardware)", "native, avx512_bf16 (tested on hardware)"
ONEDNN = "oneDNN: this CPU has bfloat16 instructions"
AVX2, AVX512, AMX = {"avx2": 0}, {"avx2": 0, "avx512_bf16": 1}, {"avx2": 0, "avx512_bf16": 1, "amx_bf16": 2}
NO_KERNELS = {"none of ours, but bfloat16": -1}


@pytest.fixture
def _cpu(monkeypatch: pytest.MonkeyPatch, sets: dict[str, int]) -> None:
    """A CPU with these instruction sets of the kernels, and a torch that knows them."""
    ours = {name: number for name, number in sets.items() if number >= 0}
    monkeypatch.setattr(compute_module, "has_bfloat16", lambda: bool(sets) and sets != AVX2)
    monkeypatch.setattr(compute_module, "has_tiles", lambda: "amx_bf16" in sets)
    monkeypatch.setattr(native, "instruction_sets", lambda: ours)


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize(
    ("sets", "kernels", "attention", "linears", "isa"),
    [
        (AVX2, "auto", "native", "native", 0),
        (AVX512, "auto", "native", "native", 1),
        (AMX, "auto", "native", "onednn", 1),
        (AMX, "native", "native", "native", 2),
        (AVX512, "torch", "torch", "onednn", -1),
        (AVX2, "torch", "torch", "widened", -1),
        ({}, "auto", "torch", "widened", -1),
        (NO_KERNELS, "auto", "torch", "onednn", -1),
    ],
)
def test_each_part_is_what_is_fastest_and_has_run(
    kernels: KernelChoice, attention: str, linears: str, isa: int
) -> None:
    compute = Compute.choose("cpu", "bfloat16", kernels)
    assert (compute.attention, compute.linears, compute.experts, compute.isa) == (attention, linears, linears, isa)
    assert Compute.choose("cpu", "float32", "auto") == Compute(torch.device("cpu"), torch.float32)


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize(
    ("sets", "kernels", "expert_dtype", "told"),
    [
        (AVX2, "auto", "auto", [AVX2_TESTED] * 3),
        (AMX, "auto", "auto", [AVX512_TESTED, *[ONEDNN] * 2]),
        (AVX2, "torch", "auto", ["torch: as chosen", *["torch, slow: as chosen"] * 2]),
        (AMX, "native", "auto", ["native, amx_bf16 (only emulated: never run on a CPU that has it)"] * 3),
        (AVX512, "auto", "int8", [AVX512_TESTED] * 3),
        (
            AVX512,
            "torch",
            "int8",
            ["torch: as chosen", ONEDNN, "torch: as chosen"],
        ),
    ],
)
def test_what_is_used_and_why(kernels: KernelChoice, expert_dtype: ExpertDtype, told: list[str]) -> None:
    compute = Compute.choose("cpu", "bfloat16", kernels, expert_dtype)
    parts = ("attention", "linear layers", "int8 experts" if expert_dtype == "int8" else "experts")
    assert list(describe(compute, kernels)) == [f"{part}: {why}" for part, why in zip(parts, told, strict=True)]


def test_what_was_asked_for_and_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "instruction_sets", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"kernels='native': .*: choose auto or torch"):
        Compute.choose("cpu", "bfloat16", "native")
    with pytest.raises(ConfigError, match=r"expert_dtype='int8' wants a CPU and bfloat16.* has cpu and float32"):
        Compute.choose("cpu", "float32", "auto", "int8")
    with pytest.raises(ModelError, match="torch sees no GPU in this actor"):
        Compute.choose("cuda", "bfloat16")


def test_on_a_gpu_attention_is_flash_and_experts_are_never_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_gpu = Compute.choose("auto", "bfloat16")
    assert on_gpu == Compute(torch.device("cuda"), torch.bfloat16, attention="flash")
    with pytest.raises(ConfigError, match="this actor has cuda and bfloat16"):
        Compute.choose("auto", "bfloat16", "auto", "int8")


def test_cards_before_ampere_have_no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert Compute.choose("cuda", "bfloat16").attention == "torch"


@pytest.mark.parametrize(
    ("cuda", "visible", "told"),
    [
        (None, None, "this torch is a CPU build"),
        ("13.0", "", "Ray has reserved no GPU for it, set gpus_per_front or gpus_per_replica"),
        ("13.0", "0", r"this torch is for CUDA 13\.0: .*nvidia-smi.* driver .*580"),
    ],
)
def test_why_there_is_no_gpu_is_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, visible: str | None, told: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ModelError, match=f"torch sees no GPU in this actor: .*{told}"):
        Compute.choose("cuda", "bfloat16")


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize("sets", [AVX2])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, [AVX2_TESTED, AVX2_TESTED, "one native call", AVX2_TESTED]),
        (
            {"head_dim": 12},
            [
                "torch, slow: head_dim=12 is no multiple of 8",
                AVX2_TESTED,
                "step by step, for its attention",
                AVX2_TESTED,
            ],
        ),
        (
            {"hidden_act": "gelu"},
            [
                AVX2_TESTED,
                AVX2_TESTED,
                "one native call",
                f"matrix by matrix, {AVX2_TESTED}: hidden_act='gelu' is not silu",
            ],
        ),
    ],
)
def test_what_a_model_is_computed_with(changes: dict[str, Any], told: list[str]) -> None:
    spec = spec_of(GRANITEMOE | changes)
    lines = list(describe(Compute.choose("cpu", "bfloat16"), "auto", spec))
    assert [line.partition(": ")[2] for line in lines] == told
