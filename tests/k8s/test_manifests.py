"""Every kustomization renders, and every object that comes out is one that the API server and KubeRay would take."""

import os
from pathlib import Path

import pytest
import yaml

from tests.k8s import rules, schema, serve_config
from tests.k8s.manifests import K8S, OVERLAYS, kustomizations, objects, one, overlay, title

needs_crds = pytest.mark.skipif(not schema.CRDS.is_dir(), reason=schema.MISSING_CRDS)
MONITORING = {"PodMonitor/outcrop", "PrometheusRule/outcrop", "ConfigMap/outcrop-dashboards"}
OTHERS = [name for name in OVERLAYS if name != "production"]


def test_the_overlays_are_there() -> None:
    assert {K8S / "base", *(K8S / "overlays" / name for name in OVERLAYS)} <= set(kustomizations())


@pytest.mark.parametrize("name", OTHERS)
def test_an_overlay_gets_monitoring_by_one_line(name: str, tmp_path: Path) -> None:
    above = {"resources": K8S / "overlays" / name, "components": K8S / "components/monitoring"}
    lines = {key: [os.path.relpath(directory, tmp_path.resolve())] for key, directory in above.items()}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(lines))
    found = objects(tmp_path)
    added = {title(each) for each in found} - {title(each) for each in overlay(name)}
    assert added == MONITORING
    assert rules.broken(found) == []


def test_who_needs_the_operator_of_prometheus() -> None:
    assert {title(each) for each in overlay("production")} >= MONITORING
    for name in OTHERS:
        assert not [title(each) for each in overlay(name) if "monitoring" in each["apiVersion"]]


@needs_crds
@pytest.mark.parametrize("directory", kustomizations(), ids=lambda d: str(d.relative_to(K8S)))
def test_every_object_fits_its_schema(directory: Path) -> None:
    found = objects(directory)
    assert found
    assert {title(each): wrong for each in found if (wrong := schema.errors(each))} == {}


@pytest.mark.parametrize("name", OVERLAYS)
def test_rules_that_no_schema_expresses(name: str) -> None:
    assert rules.broken(overlay(name)) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_serve_would_build_the_application(name: str) -> None:
    assert serve_config.errors(one(overlay(name), "RayService")) == []
