"""A real Prometheus scrapes the server, evaluates the rules and answers the queries of the dashboards."""

import json
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.metrics import PREFIX, TABLE
from tests.e2e.servers import PLAIN, Server, eventually, free_port

ROOT = Path(__file__).parents[2]
RULES = yaml.safe_load((ROOT / "k8s/prometheus/rules.yaml").read_text())
RECORDED = [rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule]
BOARDS = [json.loads((ROOT / f"k8s/grafana/{name}.json").read_text()) for name in ("overview", "experts")]
PANELS = [(f"{board['title']}: {p['title']}", p) for board in BOARDS for p in board["panels"] if "targets" in p]
VALUES = {"$__rate_interval": "15s", "$namespace": ".*", "$cluster": ".*"}
WAIT_S = 20.0

# What stays at 0 when nothing breaks and nothing is short. tests/chaos and tests/e2e/test_limits.py make it happen.
STILL = {
    "requests_failed_total": "no request fails",
    "num_requests_waiting": "fewer requests than a front runs at once",
    "num_preemptions_total": "the KV cache is large enough",
    "lane_dropped_messages_total": "nobody sends garbage",
    "failovers_total": "no replica is lost",
    "local_fallback_tokens_total": "no group is without replica",
    "actor_restarts_total": "no actor is lost",
    "front_replays_total": "no front is lost",
}

pytestmark = pytest.mark.needs("prometheus")


class Prometheus:
    """A Prometheus of our own that scrapes one target every second."""

    def __init__(self, target: Server, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        config = yaml.safe_load((ROOT / "k8s/prometheus/prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target.url.removeprefix("http://")]
        groups = [{"name": group["name"], "rules": group["rules"]} for group in RULES["groups"]]
        (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        flags = {"config.file": folder / "prometheus.yaml", "storage.tsdb.path": folder / "data", "log.level": "warn"}
        flags["web.listen-address"] = self.url.removeprefix("http://")
        self.process = subprocess.Popen(["prometheus", *(f"--{name}={value}" for name, value in flags.items())])

    def get(self, path: str, **params: str) -> Any:
        response = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=10, **PLAIN)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    def values(self, query: str) -> list[float]:
        """The samples of an instant query, those that are not a number left out."""
        found = [float(sample["value"][1]) for sample in self.get("query", query=query)["result"]]
        return [value for value in found if value == value]

    def is_ready(self) -> bool:
        assert self.process.poll() is None
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=1, **PLAIN).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def keep_busy(server: Server, is_over: threading.Event) -> None:
    """Requests that end for both reasons, streamed or not, with a prompt that the prefix cache knows."""
    reasons = ({"max_tokens": 40, "ignore_eos": True}, {"max_tokens": 1500, "stop_token_ids": [*range(100)]})
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        while not is_over.is_set():
            for stream, until in zip((True, False), reasons, strict=True):
                body = {"prompt": [7] * 64, "n": 2, "temperature": 1, "stream": stream} | until
                client.post("/v1/completions", json=body).raise_for_status()


@pytest.fixture(scope="module")
def server(operated: Server) -> Server:
    return operated


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scraping while the server is busy, so that rates are not 0, and its experts have been placed anew."""
    running, is_over = Prometheus(server, tmp_path_factory.mktemp("prometheus")), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            eventually(running.is_ready, "Prometheus is ready", WAIT_S)
            server.unbalance()
            busy = pool.submit(keep_busy, server, is_over)
            eventually(lambda: server.metric("generation_tokens_total") > 100, "there is load to balance", WAIT_S)
            httpx.post(f"{server.url}/v1/cluster/rebalance", json={"force": True}, timeout=60).raise_for_status()
            yield running
            is_over.set()
            busy.result()
        finally:
            is_over.set()
            running.stop()


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_every_metric_arrives_and_moves(prometheus: Prometheus, metric: Any) -> None:
    name = PREFIX + metric.name + ("_count" if metric.kind == "histogram" else "")
    eventually(lambda: bool(prometheus.values(name)), f"{name} is there", WAIT_S)
    if metric.name not in STILL:
        query = f"max_over_time({name}[5m]) > 0"
        eventually(lambda: bool(prometheus.values(query)), f"{name} is above 0", WAIT_S)


@pytest.mark.parametrize("panel", [panel for _, panel in PANELS], ids=[name for name, _ in PANELS])
def test_every_query_of_a_panel_has_data(prometheus: Prometheus, panel: dict[str, Any]) -> None:
    for query in (target["expr"] for target in panel["targets"]):
        for variable, value in VALUES.items():
            query = query.replace(variable, value)
        eventually(lambda query=query: bool(prometheus.values(query)), f"there is data: {query}", WAIT_S)  # type: ignore[misc]


@pytest.mark.parametrize("record", RECORDED)
def test_every_recording_rule_records(prometheus: Prometheus, record: str) -> None:
    eventually(lambda: bool(prometheus.values(record)), f"{record} is there", WAIT_S)


def test_rules_evaluate_without_error_and_no_alert_fires_in_a_healthy_cluster(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    eventually(lambda: all(rule["health"] == "ok" for rule in rules()), f"all rules are ok: {rules()}", WAIT_S)
    assert [rule["name"] for rule in rules() if rule["type"] == "alerting" and rule["state"] != "inactive"] == []


def test_exceptions_name_what_exists() -> None:
    assert set(STILL) <= {metric.name for metric in TABLE}
