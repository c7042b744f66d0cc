"""What Serve says of the application: RUNNING is a promise that it serves, for that is when KubeRay moves on to it."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatusOverview, ServeDeploySchema

from actors.process.orphan import is_deployed
from cluster.messages.state import ClusterState
from deploy.demo import MODEL_DIR

APP = "gated"
TIMEOUT_S = 90.0
# No node has it, so loading goes on for ever.
NEVER = {"front_resources": {"nowhere": 1}, "replica_resources": {"nowhere": 1}}


@pytest.fixture
def serve_session(ray_session: None) -> Iterator[None]:
    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()


def deploy(model_dir: Path, **settings: Any) -> None:
    """As Ray's dashboard does with what KubeRay sends; returns at once."""
    args = {"model": str(model_dir), "device": "cpu", "groups": 2, **settings}
    application = {"name": APP, "import_path": "deploy.app:build", "args": args}
    _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]), _blocking=False)


def application() -> ApplicationStatusOverview:
    return serve.status().applications[APP]


def status_of(deployment: str) -> str | None:
    """None while the application is being built."""
    found = application().deployments.get(deployment)
    return found.status.value if found else None


def cluster_state() -> ClusterState:
    state: ClusterState = serve.get_deployment_handle("supervisor", APP).state.remote().result(timeout_s=30)
    return state


def until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline, (
            f"not within {TIMEOUT_S:g} s: {what}; Serve says {application()}, the supervisor {cluster_state()}"
        )
        time.sleep(0.25)  # Serve's controller answers, while it has other things to do


def is_loading_with_everything_else_there() -> bool:
    there = all(status_of(name) == "HEALTHY" for name in ("supervisor", "ingress"))
    return there and cluster_state().phase == "loading weights"


def test_serve_tells_a_load_that_fails_from_one_that_lasts(serve_session: None, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(MODEL_DIR, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes((MODEL_DIR / "model.safetensors").read_bytes()[:-1])
    deploy(broken)
    until(lambda: application().status == "DEPLOY_FAILED", "the application has failed")
    assert "model.safetensors is cut off" in application().deployments["gate"].message
    assert status_of("ingress") == "HEALTHY", "/health goes on to tell what is wrong"

    deploy(MODEL_DIR)
    until(lambda: application().status == "RUNNING", "the application runs")
    assert cluster_state().state == "ready"

    # In place of one that serves: the old gate is open, and must not speak for the new cluster.
    deploy(MODEL_DIR, **NEVER)
    until(is_loading_with_everything_else_there, "the new cluster loads")
    assert application().status == "DEPLOYING"
    assert status_of("gate") == "UPDATING"

    assert is_deployed(f"outcrop-{APP}")  # what actors ask whose supervisor has long been silent
    serve.delete(APP)
    until(lambda: not is_deployed(f"outcrop-{APP}"), "the application is gone")
