"""Compute: what an actor computes with, as a value. Chosen once from settings and machine, then handed to whoever loads
weights or computes. `python -m actors.compute` tells what that is here, and why.

Attention, linear layers and experts are chosen independently, each by what was measured to be the fastest
(docs/benchmarks.md). Plain torch is the oracle of every other way.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, cast

import torch

from actors.kernels import native
from cluster.errors import ConfigError, ModelError
from cluster.messages.actors import ExpertDtype, KernelChoice
from cluster.models.family import spec_at
from cluster.models.spec import ModelSpec

# How matrices are multiplied: plain, packed for oneDNN, packed for our own kernels, or widened to float32 by pieces.
Products = Literal["torch", "onednn", "native", "widened"]
Attention = Literal["torch", "native", "flash"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Compute:
    """`flash` is PyTorch's flash attention with block tables, on GPUs. `isa` numbers the instruction set of whatever is
    native (actors/kernels/native.py).
    """

    device: torch.device
    dtype: torch.dtype
    attention: Attention = "torch"
    linears: Products = "torch"
    experts: Products = "torch"
    int8_experts: bool = False
    isa: int = -1

    @classmethod
    def choose(
        cls, device: str, dtype: str, kernels: KernelChoice = "auto", expert_dtype: ExpertDtype = "auto"
    ) -> "Compute":
        """Raises ConfigError or ModelError if what is asked for can't be had."""
        where, kind, is_int8 = torch_device(device), DTYPES[dtype], expert_dtype == "int8"
        if is_int8 and (where.type != "cpu" or kind != torch.bfloat16):
            raise ConfigError(f"expert_dtype='int8' wants a CPU and bfloat16, this actor has {where.type} and {dtype}")
        if kind != torch.bfloat16:
            return cls(where, kind)
        if where.type != "cpu":
            return cls(where, kind, attention="flash" if can_use_flash(where) else "torch")
        return cls._on_cpu(where, kernels, is_int8)

    @classmethod
    def _on_cpu(cls, device: torch.device, kernels: KernelChoice, is_int8: bool) -> "Compute":
        has_native = kernels != "torch" and bool(native.instruction_sets())
        if kernels == "native" and not has_native:
            raise ConfigError(f"kernels='native': {why_not_native()}: choose auto or torch")
        products = _products(kernels, has_native)
        return cls(
            device,
            torch.bfloat16,
            attention="native" if has_native else "torch",
            linears=products,
            experts="native" if has_native and is_int8 else products,
            int8_experts=is_int8,
            isa=_isa(kernels) if has_native else -1,
        )


def _products(kernels: KernelChoice, has_native: bool) -> Products:
    """oneDNN comes first only where the CPU multiplies tiles (AMX): there our kernels have never run. With AVX2 and
    with AVX512-BF16 ours are faster, for single tokens and for prompts.
    """
    if has_native and (kernels == "native" or not has_tiles()):
        return "native"
    return "onednn" if has_bfloat16() else "widened"


def _isa(kernels: KernelChoice) -> int:
    """Unless they are asked for, only instruction sets that the kernels have run on."""
    sets = native.instruction_sets()
    return sets[
        next(name for name in reversed(sets) if kernels == "native" or native.TESTED[name].startswith("tested"))
    ]


def torch_device(name: str) -> torch.device:
    """`auto` takes the GPU that Ray has assigned if torch can use it. Raises ModelError if cuda can't be had."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device='cuda', but torch sees no GPU in this actor: {_why_no_gpu()}; or set device=cpu")
    return torch.device(name)


def _why_no_gpu() -> str:
    """What is so, and the way out. Not yet seen on a machine with a GPU."""
    if torch.version.cuda is None:
        return "this torch is a CPU build: install one for CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return "CUDA_VISIBLE_DEVICES is empty: Ray has reserved no GPU for it, set gpus_per_front or gpus_per_replica"
    return (
        f"this torch is for CUDA {torch.version.cuda}: look with nvidia-smi whether there is a GPU, and a driver for "
        "that version (CUDA 13.0 needs 580 or newer)"
    )


def can_use_flash(device: torch.device) -> bool:
    """Flash attention wants compute capability 8.0 (Ampere)."""
    return bool(torch.cuda.get_device_capability(device) >= (8, 0))


@cache
def has_bfloat16() -> bool:
    """Whether this CPU and this build of torch multiply bfloat16 matrices natively."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def has_tiles() -> bool:
    """Whether this CPU has AMX for bfloat16."""
    return has_bfloat16() and torch.cpu._is_amx_tile_supported()


@contextmanager
def told_if_out_of_memory(what: str, way_out: str) -> Iterator[None]:
    """Raises ModelError where a GPU has no room."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).partition("\n")[0]
        raise ModelError(f"{what} does not fit into the GPU's memory: {way_out} ({first})") from None


def why_not_native() -> str:
    reason = native.why_not_loaded()
    return reason or "this CPU has none of the instruction sets of the native kernels (the least is AVX2)"


def why_not_native_attention(spec: ModelSpec) -> str:
    """What the native attention refuses of a model; empty if nothing."""
    return f"head_dim={spec.head_dim} is no multiple of 8" if spec.head_dim % 8 else ""


def why_not_native_mlp(spec: ModelSpec) -> str:
    """What the native experts refuse of a model; empty if nothing."""
    return f"hidden_act={spec.activation!r} is not silu" if spec.activation != "silu" else ""


def describe(compute: Compute, kernels: KernelChoice, spec: ModelSpec | None = None) -> Iterator[str]:
    """Lines for people: what computes bfloat16 on this CPU, and why; with a `spec`, what computes that model."""
    names = {number: name for name, number in native.instruction_sets().items()}
    name = names.get(compute.isa, "")
    of_kernels = f"native, {name} ({native.TESTED[name]})" if name else ""
    without = "as chosen" if kernels == "torch" else why_not_native()
    said = {
        "native": of_kernels,
        "onednn": "oneDNN: this CPU has bfloat16 instructions",
        "widened": f"torch, slow: {without}",
        "torch": f"torch: {without}",
        "flash": "flash attention, over block tables",
    }
    no_attention, no_mlp = (why_not_native_attention(spec), why_not_native_mlp(spec)) if spec else ("", "")
    is_gathered = compute.attention == "native" and no_attention
    yield f"attention: {f'torch, slow: {no_attention}' if is_gathered else said[compute.attention]}"
    yield f"linear layers: {said[compute.linears]}"
    if spec and compute.attention == compute.linears == "native":
        yield f"front half of a layer: {'step by step, for its attention' if no_attention else 'one native call'}"
    if compute.experts == "native" and no_mlp:
        yield f"experts: matrix by matrix, {said['native']}: {no_mlp}"
    elif compute.int8_experts:
        yield f"int8 experts: {of_kernels if compute.experts == 'native' else said['torch']}"
    else:
        yield f"experts: {said[compute.experts]}"


def main(kernels: str = "auto", expert_dtype: str = "auto", model: str = "") -> None:
    """What `outcrop check` shows of this machine, and of the model at this path."""
    choice = cast("KernelChoice", kernels)
    try:
        compute = Compute.choose("cpu", "bfloat16", choice, cast("ExpertDtype", expert_dtype))
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    spec = spec_at(Path(model)) if model else None
    print("bfloat16 on this CPU:", *describe(compute, choice, spec), sep="\n  ")


if __name__ == "__main__":
    main(*sys.argv[1:])
