"""Chart and overlays render, and every object that comes out is one that the API server and KubeRay would take."""

import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.k8s import rules, schema, serve_config
from tests.k8s.manifests import CHARTS, K8S, OVERLAYS, Object, chart, kustomizations, needs_helm, one, overlay, title
from tests.k8s.schema import needs_crds

MONITORING = {"PodMonitor/outcrop", "PodMonitor/outcrop-ray", "PrometheusRule/outcrop", "ConfigMap/outcrop-dashboards"}
ALL = [pytest.param(overlay, (name,), id=name) for name in OVERLAYS]
ALL += [pytest.param(chart, names, id="+".join(names), marks=needs_helm) for names in CHARTS]
every = pytest.mark.parametrize(("render", "names"), ALL)


@needs_helm
def test_the_overlays_are_what_the_chart_renders() -> None:
    assert set(kustomizations()) == {K8S / "overlays" / name for name in OVERLAYS}
    done = subprocess.run([sys.executable, K8S / "render.py", "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "up to date\n"), done.stderr


@needs_helm
def test_helm_has_nothing_to_say_of_the_chart() -> None:
    """But that it has no icon."""
    ask = "import sys; from helm_python.chart import lint; print(lint(sys.argv[1], strict=True)['messages'])"
    command = [sys.executable, "-c", ask, str(K8S / "chart")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[{'severity': 1, 'path': 'Chart.yaml', 'error': 'icon is recommended'}]\n"


def test_every_example_is_rendered_somewhere() -> None:
    overlays = {name for name in OVERLAYS if name != "production"}
    used = overlays | {name for names in CHARTS for name in names}
    assert {file.stem for file in (K8S / "chart/examples").iterdir()} == used


def test_who_needs_the_operator_of_prometheus() -> None:
    assert {title(each) for each in overlay("production")} >= MONITORING
    for name in OVERLAYS[:-1]:
        assert not [title(each) for each in overlay(name) if "monitoring" in each["apiVersion"]]


def test_the_rules_are_those_that_are_tested_elsewhere() -> None:
    wrapped = one(overlay("production"), "PrometheusRule")["spec"]
    assert wrapped == yaml.safe_load((K8S / "prometheus/rules.yaml").read_text())


def test_without_a_key_none_is_read() -> None:
    assert "OUTCROP_API_KEY" in str(overlay("cpu-demo"))
    assert "OUTCROP_API_KEY" not in str(overlay("cpu-demo-open"))


@needs_helm
def test_what_a_route_leads_to() -> None:
    """Gateway API has no schema here: the fields have the names of its reference (gateway.networking.k8s.io/v1)."""
    spec = one(chart("gpu-multi-node", "production", "gke", "exposed"), "HTTPRoute")["spec"]
    (rule,) = spec["rules"]
    assert spec["hostnames"] == ["models.example.com"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/granite"}}]
    rewrite = {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}}
    assert rule["filters"] == [{"type": "URLRewrite", "urlRewrite": rewrite}]
    assert rule["timeouts"] == {"request": "3600s", "backendRequest": "3600s"}
    assert rule["backendRefs"] == [{"name": "outcrop-api", "port": 8000}]


@needs_crds
@every
def test_every_object_fits_its_schema(render: Any, names: tuple[str, ...]) -> None:
    found: list[Object] = [each for each in render(*names) if each["kind"] != "HTTPRoute"]
    assert found
    assert {title(each): wrong for each in found if (wrong := schema.errors(each))} == {}


@every
def test_rules_that_no_schema_expresses(render: Any, names: tuple[str, ...]) -> None:
    assert rules.broken(render(*names)) == []


@every
def test_serve_would_build_the_application(render: Any, names: tuple[str, ...]) -> None:
    assert serve_config.errors(one(render(*names), "RayService")) == []
