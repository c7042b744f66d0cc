"""`outcrop plan` and `outcrop probe` as commands, in process."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.config import load_config
from cluster.planning.hardware import HttpSpeed, read_profile
from cluster.planning.search import numbers
from deploy.cli import probe
from deploy.cli.main import app

PUBLISHED = json.loads((Path(__file__).parents[1] / "published_configs.json").read_text())


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLISHED["Qwen/Qwen3-30B-A3B"]))
    return file


def plan(config: Path, *more: str) -> Result:
    return CliRunner().invoke(app, ["plan", str(config), *more], env={"COLUMNS": "200"})


ASKED = ("--hardware", "h100:8", "--rate", "2", "--tpot", "50", "--survive", "1")


def test_a_plan_says_what_follows_from_it(config: Path) -> None:
    done = plan(config, *ASKED, "--cost-per-hour", "h100=2.5")
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "do not disaggregate" in said
    assert "one machine is enough; nothing is left if it is lost" in said
    assert "h100: figures of a data sheet, never measured" in said


def test_what_is_too_large_for_a_device_is_disaggregated(config: Path) -> None:
    done = plan(config, "--hardware", "l40s:8", "--rate", "0.1", "--tpot", "300")
    assert done.exit_code == 0, done.output
    assert "disaggregate: a front with all experts does not fit one device" in " ".join(done.output.split())


def test_the_file_of_a_plan_is_a_configuration(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "outcrop.yaml"
    done = plan(config, *ASKED, "--lane", "unix", "--survive", "0", "--out", str(out), "--serve-as", "/models/qwen")
    assert done.exit_code == 0, done.output
    read = load_config({}, out, environ={})
    assert read.model == "/models/qwen"
    assert read.fronts + read.groups * read.replicas <= 8
    assert (read.device, read.lane) == ("cuda", "auto")
    assert yaml.safe_load(out.read_text())["max_num_seqs"] <= 256


def test_measured_counts_change_the_plan(config: Path, tmp_path: Path) -> None:
    counts = tmp_path / "experts.json"
    counts.write_text(json.dumps({"counts": [[1000] + [1] * 127] * 48}))
    asked = ("--hardware", "l40s:8", "--rate", "0.1", "--tpot", "300")
    even, hot = plan(config, *asked), plan(config, *asked, "--expert-counts", str(counts))
    assert even.exit_code == hot.exit_code == 0, hot.output
    assert even.output != hot.output


def test_a_picture_is_drawn(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.svg"
    assert plan(config, *ASKED, "--plot", str(picture)).exit_code == 0
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--hardware", "h100:8"), "rate=None and concurrency=None: give one of them"),
        (("--hardware", "h100:x", "--rate", "1"), "hardware='h100:x': write a profile and the number of its devices"),
        (("--hardware", "nothing", "--rate", "1"), "hardware='nothing' can't be read"),
        (("--hardware", "l4", "--rate", "1"), "no layout fits the 56.9 GiB of weights"),
        (("--hardware", "h100", "--rate", "1", "--cost-per-hour", "h100=x"), "cost_per_hour='h100=x'"),
        (("--hardware", "h100", "--rate", "1", "--input-len", "50000"), "more than the model's context of 40960"),
        (("--hardware", "h100", "--rate", "1e4", "--out", "x.yaml"), "no layout holds, so none is written"),
        (("--hardware", "h100", "--rate", "1", "--expert-counts", "none.json"), "expert_counts='none.json'"),
        (("--hardware", "h100:8", "--rate", "nan"), "rate=nan: choose more than 0"),
        (("--hardware", "h100:8", "--rate", "inf"), "rate=inf: choose more than 0"),
        (("--hardware", "h100:8", "--rate", "1", "--ttft", "nan"), "ttft=nan: choose"),
        (("--hardware", "h100:8", "--rate", "1", "--tpot", "-5"), "tpot=-0.005: choose"),
        (("--hardware", "h100:8", "--rate", "1", "--cost-per-hour", "-2"), "cost_per_hour=-2: choose"),
        (("--hardware", "h100:8", "--rate", "1", "--cost-per-hour", "h1000=2"), "no --hardware has this name"),
        (("--hardware", "h100:4", "--hardware", "h100:4", "--rate", "1"), "two are named 'h100'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_told_with_the_way_out(config: Path, asked: tuple[str, ...], told: str) -> None:
    done = plan(config, *asked)
    assert done.exit_code == 1
    assert told in " ".join(done.output.split())


def test_hundreds_of_devices_are_searched_in_few_steps() -> None:
    assert numbers(8) == list(range(1, 9))
    assert numbers(10**9)[-1] == 256
    assert len(numbers(10**9)) < 20


def test_what_was_measured_becomes_a_profile_that_a_plan_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the measuring, which takes a quiet machine."""
    figures = read_profile("h100").model_dump(exclude={"version", "name", "source", "http", "cost_per_hour"})
    monkeypatch.setattr(probe, "measured", lambda threads: figures | {"device": "cpu", "devices": 1})
    monkeypatch.setattr(probe, "measure_http", lambda: HttpSpeed(token_us=123.456, request_ms=4.0))
    out = tmp_path / "here.json"
    done = CliRunner().invoke(app, ["probe", "--name", "My Box!", "--out", str(out), "--cost-per-hour", "1"])
    assert done.exit_code == 0, done.output
    found = read_profile(str(out))
    assert (found.name, found.source, found.http.token_us, found.cost_per_hour) == ("my-box", "measured", 123.5, 1.0)
