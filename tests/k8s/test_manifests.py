"""Every kustomization renders, and every object that comes out is one that the API server and KubeRay would take."""

from pathlib import Path

import pytest

from tests.k8s import rules, schema, serve_config
from tests.k8s.manifests import K8S, OVERLAYS, kustomizations, objects, one, overlay, title

needs_crds = pytest.mark.skipif(not schema.CRDS.is_dir(), reason=schema.MISSING_CRDS)


def test_the_overlays_are_there() -> None:
    assert {K8S / "base", *(K8S / "overlays" / name for name in OVERLAYS)} <= set(kustomizations())


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
