"""Recording and alerting rules, judged by promtool: each alert fires when it should and is silent when it should."""

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.metrics import PREFIX, TABLE
from tests.k8s.manifests import overlay, title

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "k8s/prometheus"
RUNBOOKS = (ROOT / "docs/runbooks.md").read_text()
RULES = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())
TESTS = yaml.safe_load((PROMETHEUS / "rules_test.yaml").read_text())
ALERTS: dict[str, dict[str, Any]] = {r["alert"]: r for g in RULES["groups"] for r in g["rules"] if "alert" in r}
needs_promtool = pytest.mark.needs("promtool")
FIRES, NEVER = "vector(1)", "vector(1) > 1"


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)


def cases(alert: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The test groups in which an alert fires, and those in which it never does."""
    own = [group for group in TESTS["tests"] if group["name"].startswith(f"{alert} ")]
    firing = [g for g in own if any(c["exp_alerts"] for c in g["alert_rule_test"] if c["alertname"] == alert)]
    return firing, [group for group in own if group not in firing]


def metrics_of(groups: list[dict[str, Any]]) -> set[str]:
    return {entry["series"].partition("{")[0] for group in groups for entry in group["input_series"]}


@needs_promtool
def test_rules_and_example_configuration_are_valid() -> None:
    checked = promtool("check", "rules", PROMETHEUS / "rules.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    checked = promtool("check", "config", PROMETHEUS / "prometheus.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_promtool
def test_every_case_holds() -> None:
    tested = promtool("test", "rules", PROMETHEUS / "rules_test.yaml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_has_a_firing_and_a_silent_case(alert: str) -> None:
    firing, silent = cases(alert)
    assert firing
    assert silent
    # Without samples any alert would be silent.
    assert metrics_of(silent) >= metrics_of(firing)


@needs_promtool
@pytest.mark.parametrize("alert", ALERTS)
@pytest.mark.parametrize("broken", [FIRES, NEVER], ids=["always fires", "never fires"])
def test_the_cases_find_a_broken_alert(alert: str, broken: str, tmp_path: Path) -> None:
    rules = copy.deepcopy(RULES)
    (rule,) = [r for group in rules["groups"] for r in group["rules"] if r.get("alert") == alert]
    rule["expr"] = broken
    firing, silent = cases(alert)
    own = [g | {"alert_rule_test": [c for c in g["alert_rule_test"] if c["alertname"] == alert]} for g in firing[:1]]
    own = silent[:1] if broken == FIRES else own
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "broken.test.yaml").write_text(yaml.safe_dump(TESTS | {"tests": own}))
    assert f"alertname: {alert}" in promtool("test", "rules", tmp_path / "broken.test.yaml").stderr


def test_rules_name_only_metrics_of_the_table() -> None:
    expressions = " ".join(rule["expr"] for group in RULES["groups"] for rule in group["rules"])
    recorded = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
    samples = {d.name + s for d in TABLE for s in (("_bucket",) if d.kind == "histogram" else ("",))}
    assert set(re.findall(rf"(?<!cluster:){PREFIX}(\w+)", expressions)) <= samples
    assert set(re.findall(r"cluster:[\w:]+", expressions)) <= recorded


def test_no_rule_counts_the_numbers_of_a_cluster_once_for_each_pod() -> None:
    """Every metric is first brought to its maximum over pods; see the head of rules.yaml."""
    once = (
        r"max without \(pod, instance, container, endpoint(?:, state)?\)\s*\((?:(?:rate|increase)\()?outcrop_[^()]*\)"
    )
    for rule in (rule for group in RULES["groups"] for rule in group["rules"]):
        if rule.get("alert") != "OutcropDown":  # asks only whether a metric is there
            assert not re.search(r"(?<!:)outcrop_", re.sub(once, "", rule["expr"])), rule


def test_the_operator_scrapes_the_pods_of_the_service() -> None:
    found = {title(each): each["spec"] for each in overlay("production") if "spec" in each}
    monitor, service = found["PodMonitor/outcrop"], found["Service/outcrop-api"]
    assert monitor["selector"]["matchLabels"] == service["selector"]
    (endpoint,), (port,) = monitor["podMetricsEndpoints"], service["ports"]
    assert (endpoint["port"], endpoint["path"]) == (port["targetPort"], "/metrics")


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    assert re.findall(r"^## (Outcrop\w+)$", RUNBOOKS, re.MULTILINE) == list(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
