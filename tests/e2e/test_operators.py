"""What operators do over HTTP and on the command line: scale, rebalance, look."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.servers import OUTCROP, Server, clean_environment, eventually

GENERATE = {"prompt": "Hi", "max_tokens": 20, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(operated: Server) -> Server:
    return operated


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


def outcrop(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = clean_environment({"OUTCROP_URL": server.url, "COLUMNS": "80", "PATH": os.environ["PATH"]})
    return subprocess.run([OUTCROP, *arguments], env=env, capture_output=True, text=True, timeout=60)


def ready(server: Server) -> tuple[int, int]:
    """(fronts, replicas) that serve, and no others there."""
    cluster = server.get("/v1/cluster").json()
    rows = cluster["fronts"] + cluster["replicas"]
    assert cluster["state"] == "ready", cluster["phase"]
    return (
        (0, 0) if any(row["state"] != "ready" for row in rows) else (len(cluster["fronts"]), len(cluster["replicas"]))
    )


def test_scale_over_http_and_back_on_the_command_line(server: Server, http: httpx.Client) -> None:
    answer = http.post("/v1/cluster/scale", json={"group": "all", "replicas": 2})
    assert (answer.status_code, answer.json()) == (200, {"wanted": {"fronts": 1, "replicas": [2, 2]}})
    eventually(lambda: ready(server) == (1, 4), "two replicas of each group", 60)
    answer = http.post("/v1/cluster/scale", json={"group": 1, "replicas": 1})
    assert answer.json()["wanted"]["replicas"] == [2, 1]
    done = outcrop(server, "scale", "--replicas", "1", "--fronts", "2")
    assert done.returncode == 0, done.stderr
    assert "fronts 2, replicas by group [1, 1]" in done.stdout
    assert "ready after" in done.stdout
    assert ready(server) == (2, 2)
    assert http.post("/v1/completions", json=GENERATE).status_code == 200
    assert outcrop(server, "scale", "--fronts", "1").returncode == 0
    assert ready(server) == (1, 2)
    assert server.metric("replica_start_seconds_count") >= 4


@pytest.mark.parametrize(
    ("path", "body", "param", "told"),
    [
        ("scale", {}, "replicas", "required"),
        ("scale", {"group": 0}, "replicas", "required"),
        ("scale", {"group": "all", "replicas": 0}, "replicas", "replicas=0"),
        ("scale", {"group": "all", "replicas": 9}, "replicas", "outside 1 to 8: see the setting max_replicas"),
        ("scale", {"group": 2, "replicas": 1}, "group", 'group=2 is not there: choose 0 to 1, or "all"'),
        ("scale", {"group": -1, "replicas": 1}, "group", "group=-1"),
        ("scale", {"group": "both", "replicas": 1}, "group", "group='both'"),
        ("scale", {"group": True, "replicas": 1}, "group", "group=True"),
        ("scale", {"group": 0, "replicas": 1.5}, "replicas", "replicas=1.5"),
        ("scale", {"fronts": 99}, "fronts", "max_fronts"),
        ("scale", {"replica": 2, "group": 0}, "replica", "did you mean 'replicas'?"),
        ("rebalance", {"dry_run": "yes"}, "dry_run", "dry_run='yes'"),
        ("rebalance", {"dryrun": True}, "dryrun", "did you mean 'dry_run'?"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    http: httpx.Client, path: str, body: dict[str, Any], param: str, told: str
) -> None:
    answer = http.post(f"/v1/cluster/{path}", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert told in error["message"]
    assert http.get("/v1/cluster").json()["wanted"] == {"fronts": 1, "replicas": [1, 1]}


def test_rebalance_tells_before_it_does(server: Server, http: httpx.Client) -> None:
    server.unbalance()
    before, rebalances = http.post("/v1/completions", json=GENERATE).json(), server.metric("rebalances_total")
    dry = http.post("/v1/cluster/rebalance", json={"dry_run": True, "force": True}).json()
    assert (dry["dry_run"], dry["changed"]) == (True, False)
    assert dry["balancedness"]["after"] >= dry["balancedness"]["before"]
    shown = outcrop(server, "rebalance", "--dry-run", "--force")
    assert "would move" in shown.stdout, shown.stderr
    version = http.get("/v1/experts").json()["map_version"]
    done = http.post("/v1/cluster/rebalance", json={"force": True}).json()
    assert (done["changed"], done["map_version"]) == (True, version + done["layers"])
    assert server.metric("rebalances_total") == rebalances + 1
    assert http.post("/v1/completions", json=GENERATE).json()["choices"] == before["choices"]
    again = http.post("/v1/cluster/rebalance")
    assert again.status_code == 200, "a body is not needed"


def test_status_shows_every_actor(server: Server) -> None:
    shown = outcrop(server, "status")
    assert shown.returncode == 0, shown.stderr
    for expected in ("front-0", "expert-g0-r0", "expert-g1-r0", "ready", "balancedness"):
        assert expected in shown.stdout
    assert outcrop(server, "scale").returncode == 1


def test_bench_measures_a_server(server: Server, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    sizes = ("--requests", "6", "--concurrency", "3", "--input-len", "9", "--output-len", "5")
    done = outcrop(server, "bench", *sizes, "--json", str(report))
    assert done.returncode == 0, done.stderr
    assert "6 requests in" in done.stdout
    figures = json.loads(report.read_text())
    assert (figures["output_tokens"], figures["failed"]) == (30, 0)
    assert 0 < figures["milliseconds"]["ttft"]["p50"] <= figures["milliseconds"]["request"]["p99"]
    refused = outcrop(server, "bench", "--input-len", "5000")
    assert refused.returncode == 1
    assert "--input-len=5000" in refused.stderr
