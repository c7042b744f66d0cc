"""`make gpu-check`: what it says on a machine without a GPU, and that each half can fail."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from actors.compute import DTYPES, Compute
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import attention, machine, speed, waits
from benchmarks.gpu_check.check import Check, NotRunError, Row, Sizes, Trial, run_half
from benchmarks.gpu_check.models import checkpoints_in
from cluster.errors import ConfigError
from tests.specs import CPU
from tests.unit import flash_attention, tape

SMALL = Sizes(hidden=64, expert_size=32, experts=8, pairs=64, context=600, steps=2, batches=(1, 3))


@pytest.fixture(autouse=True)
def _small_and_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "Sizes", lambda: SMALL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "driver_version", lambda: "")


def exit_status(out: Path | None = None) -> int:
    with pytest.raises(typer.Exit) as ended:
        gpu_check.main(out)
    return ended.value.exit_code


def test_without_a_gpu_every_half_of_the_cpu_passes(tmp_path: Path) -> None:
    assert exit_status(tmp_path / "gpu.json") == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["checks"]
    assert len(rows) == 2 * len(gpu_check.CHECKS)
    for row in rows:
        assert (row["result"], row["why"]) == (("passed", "") if row["on"] == "CPU" else ("not run", "no GPU"))


def test_what_is_computed_wrongly_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check, "CHECKS", attention.CHECKS)
    define = attention.define
    monkeypatch.setattr(attention, "define", lambda step: define(step) * 1.001)
    assert exit_status() == 1
    assert "failed" in capsys.readouterr().out


def test_what_raises_fails_and_lacking_programs_do_not() -> None:
    def run(check: Any) -> tuple[str, str]:
        row = run_half(Check("", "", check), Trial(CPU, SMALL, checkpoints_in(Path())))
        return row.result, row.why

    def lacks(trial: Trial) -> None:
        raise NotRunError("transformers is not installed")

    assert run(lambda trial: 1 / 0) == ("failed", "ZeroDivisionError: division by zero")
    assert run(lambda trial: trial.expect(False, "too slow")) == ("failed", "too slow")
    assert run(lacks) == ("not run", "transformers is not installed")


def test_after_a_failure_that_ends_all_computing_the_rest_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def illegal(trial: Trial) -> None:
        if trial.is_on_gpu:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "_gpu_computes", lambda: False)
    monkeypatch.setattr(gpu_check, "CHECKS", (Check("first", "", illegal), Check("second", "", illegal)))
    rows = [(row.result, row.why) for row in gpu_check.run_all(SMALL) if row.on == "GPU"]
    assert rows == [
        ("failed", "RuntimeError: an illegal memory access was encountered"),
        ("not run", "the GPU computes nothing since the check 'first'"),
    ]


def test_a_driver_that_torch_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040)\nUpdate it")

    monkeypatch.setattr(machine, "driver_version", lambda: "470.1")
    monkeypatch.setattr(gpu_check, "CHECKS", machine.CHECKS[:2])
    monkeypatch.setattr(torch.version, "cuda", None)
    first, second = (row for row in gpu_check.run_all(SMALL) if row.on == "GPU")
    assert first.result == "failed"
    assert "built for CPUs" in first.why
    assert (second.result, second.why) == ("not run", "no GPU that torch can use")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert machine.unusable_driver().endswith("too old (found version 11040)")


@pytest.fixture
def wrong() -> dict[str, Any]:
    """What flash attention is emulated with instead of what it was asked for."""
    return {}


@pytest.fixture
def _emulated(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]) -> None:
    """A CPU that says that it is a GPU, with 8 GiB."""

    def varlen_attn(q_THC: Any, k_BPGC: Any, v_BPGC: Any, *tables: Any, **given: Any) -> Any:
        found = flash_attention.varlen_attn(q_THC.float(), k_BPGC.float(), v_BPGC.float(), *tables, **given | wrong)
        return found.to(q_THC.dtype) if isinstance(found, torch.Tensor) else (found[0].to(q_THC.dtype), found[1])

    def choose(device: str, dtype: str, kernels: str = "auto", expert_dtype: str = "auto") -> Compute:
        if expert_dtype == "int8":
            raise ConfigError("no int8 there")
        return Compute(CPU, DTYPES[dtype], attention="flash" if dtype == "bfloat16" else "torch")

    gpu = SimpleNamespace(name="Emulated", major=9, minor=0, total_memory=8 << 30)
    fakes: dict[str, Any] = {
        "device_count": 1, "get_device_properties": gpu, "get_device_capability": (9, 0), "synchronize": None,
        "mem_get_info": (7 << 30, 8 << 30), "memory_reserved": 0, "memory_allocated": 0, "max_memory_allocated": 0,
        "empty_cache": None, "reset_peak_memory_stats": None, "set_sync_debug_mode": None,
    }  # fmt: skip
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", tape.as_one_operation(varlen_attn))
    monkeypatch.setattr("benchmarks.gpu_check.models.cuda_capture", lambda: tape.capture)
    monkeypatch.setattr(Compute, "choose", choose)
    monkeypatch.setattr(Trial, "is_on_gpu", True)


def emulated_half(check: Check, directory: Path) -> Row:
    return run_half(check, Trial(CPU, replace(SMALL, gpu_shape="gpu-check"), checkpoints_in(directory)))


@pytest.mark.usefixtures("_emulated")
@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("check", gpu_check.CHECKS, ids=lambda check: check.name)
def test_the_halves_of_a_gpu_run_to_their_end(check: Check, tmp_path: Path) -> None:
    row = emulated_half(check, tmp_path)
    no_profiler = "the profiler has seen no launch: is CUPTI there?"
    assert row.why == (no_profiler if check.name == "launches" else "")


@pytest.mark.usefixtures("_emulated")
def test_flash_attention_that_weighs_keys_otherwise_fails(wrong: dict[str, Any], tmp_path: Path) -> None:
    wrong["scale"] = 0.9 * attention.SCALE
    row = emulated_half(attention.CHECKS[1], tmp_path)
    for name in attention.cases(SMALL.context):
        for rule in attention.RULES:
            assert f"{name}, window {rule.window}: off by" in row.why


@pytest.mark.usefixtures("_emulated")
def test_what_is_slow_is_told_with_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SLOW_MS", 0.0)
    row = emulated_half(speed.CHECKS[-1], tmp_path)
    assert row.result == "passed"
    assert "is slow, most of it in" in row.figures["next step"]


def test_more_waits_than_allowed_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(waits, "PER_LAYER", 0)
    row = run_half(waits.CHECKS[0], Trial(CPU, SMALL, checkpoints_in(tmp_path)))
    assert "waits a step, at most" in row.why
