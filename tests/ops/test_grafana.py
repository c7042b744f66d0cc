"""The dashboards: as their script writes them, on metrics that exist, and laid out so that every panel is seen."""

import json
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from cluster.metrics import TABLE
from tests.k8s.manifests import one, overlay

GRAFANA = Path(__file__).parents[2] / "k8s/grafana"
BOARDS = {name: json.loads((GRAFANA / name).read_text()) for name in ("overview.json", "experts.json")}
QUERIES = [t["expr"] for board in BOARDS.values() for p in board["panels"] for t in p.get("targets", [])]


def generate(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, folder / "generate.py", *flags], capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(GRAFANA, tmp_path / "grafana", ignore=shutil.ignore_patterns("__pycache__"))


def test_dashboards_are_what_the_script_writes() -> None:
    checked = generate(GRAFANA, "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_check_finds_a_stale_dashboard(copy: Path) -> None:
    (copy / "experts.json").write_text((copy / "experts.json").read_text().replace("Lane traffic", "Traffic"))
    checked = generate(copy, "--check")
    assert (checked.returncode, checked.stdout) == (1, "experts.json is stale: run k8s/grafana/generate.py\n")


@pytest.mark.parametrize("wrong", ["kv_cache_usage", "kv_cache_usage_ratio_bucket"])
def test_a_panel_of_a_metric_that_the_table_lacks_is_refused(copy: Path, wrong: str) -> None:
    panels = (copy / "overview.py").read_text()
    (copy / "overview.py").write_text(panels.replace('"kv_cache_usage_ratio"', f'"{wrong}"'))
    written = generate(copy)
    assert written.returncode == 1
    assert f"overview.json queries outcrop_{wrong}, which cluster/metrics.py lacks" in written.stdout


def test_every_metric_is_on_a_dashboard() -> None:
    shown = set(re.findall(r"outcrop_(\w+?)(?:_bucket|_sum|_count)?\b", " ".join(QUERIES)))
    assert shown == {definition.name for definition in TABLE}


def test_no_query_counts_the_numbers_of_a_cluster_once_for_each_pod() -> None:
    metric = r"outcrop_\w+\{[^}]*\}"
    once = rf"max without \(pod, instance, container, endpoint\) \((?:{metric}|rate\({metric}\[\$__rate_interval\]\))\)"
    for query in QUERIES:
        assert "outcrop_" not in re.sub(once, "", query), query


@pytest.mark.parametrize("name", BOARDS)
def test_panels_fit_and_do_not_overlap(name: str) -> None:
    panels = BOARDS[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for a, b in combinations((panel["gridPos"] for panel in panels), 2):
        apart = (
            a["x"] + a["w"] <= b["x"],
            b["x"] + b["w"] <= a["x"],
            a["y"] + a["h"] <= b["y"],
            b["y"] + b["h"] <= a["y"],
        )
        assert any(apart), (a, b)


@pytest.mark.parametrize("name", BOARDS)
def test_the_datasource_is_the_viewers_choice(name: str) -> None:
    board: dict[str, Any] = BOARDS[name]
    assert board["templating"]["list"][0]["type"] == "datasource"
    uids = re.findall(r'"datasource": \{"type": "prometheus", "uid": "([^"]*)"\}', json.dumps(board))
    assert set(uids) == {"${datasource}"}


def test_the_sidecar_finds_every_dashboard() -> None:
    made = one(overlay("production"), "ConfigMap")
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {name: json.loads(text) for name, text in made["data"].items()} == {
        f"outcrop-{name}": board for name, board in BOARDS.items()
    }
