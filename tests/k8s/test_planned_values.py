"""What `outcrop plan --helm-values` writes renders, and passes what is wanted of every manifest here."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from deploy.cli.main import app
from tests.k8s import rules, schema, serve_config
from tests.k8s.manifests import ROOT, chart, needs_helm, one, ray_groups, title
from tests.k8s.packing import offer

QWEN = "Qwen/Qwen3-30B-A3B"
# Layouts of each form: fronts alone, one pod with GPUs, pods with a GPU each, two kinds of them, and a machine without.
ASKED = {
    "local": ("--hardware", "h100:8", "--survive", "1"),
    "one-pod": ("--hardware", "h100:8", "--lane", "unix"),
    "pods": ("--hardware", "a100:8", "--lane", "zmq", "--tpot", "400", "--rate", "0.1", "--survive", "1"),
    "two-kinds": ("--hardware", "h100:2", "--hardware", "l40s:4", "--lane", "zmq", "--tpot", "500", "--rate", "0.1"),
}
pytestmark = needs_helm


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(json.loads((ROOT / "tests/published_configs.json").read_text())[QWEN]))
    return file


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_values_of_a_plan_pass_the_checks_of_manifests(config: Path, tmp_path: Path, asked: tuple[str, ...]) -> None:
    values = tmp_path / "values.yaml"
    given = ("plan", str(config), "--rate", "1", "--tpot", "50", *asked, "--serve-as", QWEN)
    done = CliRunner().invoke(app, [*given, "--helm-values", str(values)])
    assert done.exit_code == 0, done.output
    found = chart(str(values))
    assert rules.broken(found) == []
    assert serve_config.errors(one(found, "RayService")) == []
    if schema.CRDS.is_dir():
        assert {title(each): wrong for each in found if (wrong := schema.errors(each))} == {}
    wanted = yaml.safe_load(values.read_text())["settings"]
    gpus = sum(group.get("replicas", 0) * int(offer(group)["GPU"]) for _, group in ray_groups(one(found, "RayService")))
    replicas = 0 if wanted["lane"] == "local" else wanted["groups"] * wanted["replicas"]
    assert gpus == wanted["fronts"] + replicas
