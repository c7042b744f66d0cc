"""What `outcrop serve` says when it can't start: exit code 1, one clear sentence within seconds, nothing left behind.

A row breaks a good checkpoint or setting; the message must name the field or file, the value, and the way out.
"""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from deploy.cli import server
from deploy.cli.main import app
from tests.e2e.servers import OUTCROP, clean_environment, session

LIMIT_S = 30.0
Break = Callable[[Path], object]
# Runs `outcrop serve` with arguments; returns exit code and message.
Start = Callable[..., tuple[int, str]]


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def apply(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return apply


def settings(name: str, **changes: Any) -> Break:
    """Change a JSON file of the checkpoint; None takes a key out."""

    def apply(model: Path) -> None:
        content = json.loads((model / name).read_text()) | changes
        (model / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return apply


def without(name: str) -> Break:
    return lambda model: (model / name).unlink()


def written(name: str, content: str) -> Break:
    return lambda model: (model / name).write_text(content)


def cut_off(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Runs the command line in this process, which must refuse before it starts anything."""
    for name in set(os.environ) - clean_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ADDRESS", "local")

    def no_ray(address: str | None) -> NoReturn:
        raise AssertionError("it goes on to start Ray")

    monkeypatch.setattr(server, "ray_cluster", no_ray)

    def run(*arguments: str | Path, env: dict[str, str] | None = None) -> tuple[int, str]:
        before = set(psutil.Process().children())
        result = CliRunner().invoke(app, ["serve", *map(str, arguments)], env=env, catch_exceptions=False)
        assert set(psutil.Process().children()) <= before
        return judged(result.exit_code, result.stdout, result.stderr)

    return run


def start_process(*arguments: str | Path, env: dict[str, str] | None = None) -> tuple[int, str]:
    """In a process of its own, as users do."""
    with subprocess.Popen(
        [OUTCROP, "serve", *map(str, arguments)],
        env=clean_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, message = process.communicate(timeout=LIMIT_S)
        finally:
            left = [p for p in session(process.pid) if p.pid != process.pid]
            for p in session(process.pid):
                p.kill()
    assert not left, [p.cmdline() for p in left]
    return judged(process.returncode, out, message)


def judged(code: int, out: str, message: str) -> tuple[int, str]:
    """Exit code and message."""
    assert out == "", "errors belong on stderr"
    assert "Traceback" not in message
    return code, " ".join(message.split())


@pytest.fixture
def model(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


CHECKPOINTS: dict[str, tuple[Break, list[str]]] = {
    "missing tensor": (weights(lambda t: t.pop("model.norm.weight")), ["lacks tensor model.norm.weight [32]"]),
    "wrong shape": (
        weights(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        ["model.norm.weight has shape [31]", "config.json asks for [32]"],
    ),
    "quantised": (
        weights(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        ["model.norm.weight is stored as I8", "use the checkpoint before quantisation"],
    ),
    "cut off": (cut_off, ["model.safetensors is cut off", "download it again"]),
    "no weights": (without("model.safetensors"), ["neither model.safetensors nor", "save the weights as safetensors"]),
    "no config": (without("config.json"), ["config.json is missing", "Hugging Face layout"]),
    "config is no JSON": (written("config.json", "{"), ["config.json can't be read"]),
    "other architecture": (settings("config.json", model_type="llama"), ["model_type='llama'", "'granitemoe'"]),
    "impossible config": (settings("config.json", num_experts_per_tok=9), ["num_experts_per_tok=9 is more than"]),
    "no tokenizer": (without("tokenizer.json"), ["tokenizer.json is missing", "save_pretrained"]),
    "no chat template": (
        settings("tokenizer_config.json", chat_template=None), ["has no chat template", "--chat-template none"],
    ),
    "broken chat template": (
        settings("tokenizer_config.json", chat_template="{% if %}"), ["not a valid chat template", "set chat_template"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_that_cannot_be_served(start: Start, model: Path, name: str) -> None:
    apply, told = CHECKPOINTS[name]
    apply(model)
    code, message = start(model)
    assert code == 1
    assert all(part in message for part in told), message


SETTINGS: dict[str, tuple[list[str], dict[str, str], list[str]]] = {
    "groups": (["--groups", "3"], {}, ["groups=3 does not divide 8 experts", "choose 1, 2, 4 or 8"]),
    "context": (
        ["--max-model-len", "4096"],
        {},
        ["max_model_len=4096", "context of 2048 tokens", "choose 2048 or less"],
    ),
    "environment": ([], {"OUTCROP_GROUPS": "x"}, ["groups='x'", "valid integer"]),
    "range": (["--gpu-memory-utilization", "1.5"], {}, ["gpu_memory_utilization=1.5", "less than or equal to 1"]),
    "chat template": (["--chat-template", "/nowhere.jinja"], {}, ["chat_template='/nowhere.jinja' can't be read"]),
    "no YAML file": (["--config", "/nowhere.yaml"], {}, ["config='/nowhere.yaml' can't be read"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_be_used(start: Start, model_dir: Path, name: str) -> None:
    flags, env, told = SETTINGS[name]
    code, message = start(model_dir, *flags, env=env)
    assert code == 1
    assert all(part in message for part in told), message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("groups: [1", ["can't be read"]),
        ("- groups", ["must hold a mapping of settings, got list"]),
        ("gruops: 2", ["gruops=2"]),
        ("groups: many", ["groups='many'", "valid integer"]),
        ("groups: 3", ["groups=3 does not divide 8 experts"]),
    ],
    ids=["broken", "list", "unknown key", "wrong type", "does not divide"],
)
def test_yaml_files_that_cannot_be_used(
    start: Start, model_dir: Path, tmp_path: Path, content: str, told: list[str]
) -> None:
    config = tmp_path / "outcrop.yaml"
    config.write_text(content)
    code, message = start(model_dir, "--config", config)
    assert code == 1
    assert all(part in message for part in told), message


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no-such-model", ["model='no-such-model' is no directory, and no Hub id"]),
        ("owner/no-such-model", ["model='owner/no-such-model'", "can't be fetched from the Hub"]),
        (__file__, ["is a file: give the directory"]),
    ],
    ids=["name", "Hub id", "file"],
)
def test_models_that_are_not_there(start: Start, name: str, told: list[str]) -> None:
    code, message = start(name, env={"HF_HUB_OFFLINE": "1"})
    assert code == 1
    assert all(part in message for part in told), message


def test_a_missing_model_is_asked_for(start: Start) -> None:
    code, message = start()
    assert (code, "model is missing" in message) == (1, True)


def test_a_port_in_use(start: Start, model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, message = start(model_dir, "--port", str(port))
    assert code == 1
    assert f"port={port}" in message
    assert "choose another --port" in message


@pytest.mark.parametrize("flags", [["--groups", "x"], ["--lane", "pigeon"], ["--no-such-flag"]], ids=lambda f: f[0])
def test_flags_that_cannot_be_parsed(start: Start, model_dir: Path, flags: list[str]) -> None:
    code, message = start(model_dir, *flags)
    assert code == 2
    assert flags[0] in message


PROCESSES: dict[str, tuple[Break, list[str], int, str]] = {
    "weights": (cut_off, [], 1, "model.safetensors is cut off"),
    "chat template": (settings("tokenizer_config.json", chat_template="{% if %}"), [], 1, "not a valid chat template"),
    "setting": (lambda model: None, ["--groups", "3"], 1, "groups=3 does not divide 8 experts"),
    "flag": (lambda model: None, ["--groups", "x"], 2, "--groups"),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_ends_with_the_same(model: Path, name: str) -> None:
    """Whatever is started must have ended."""
    apply, flags, expected, told = PROCESSES[name]
    apply(model)
    code, message = start_process(model, *flags)
    assert (code, told in message) == (expected, True), message
