"""What an ingress knows of the cluster while the supervisor is silent. A link that answers as told, without Ray."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from cluster.config import ClusterConfig
from cluster.errors import NotRunning
from cluster.messages.state import ClusterState, ExpertsReport
from cluster.models.hub import resolve_model
from deploy.demo import expand_demo
from deploy.ingress import cluster_api
from deploy.ingress.cluster_api import answer_of
from deploy.ingress.openai.errors import APIError
from deploy.ingress.service import Service
from tests.unit.fake_supervisor import Open


class Link:
    def __init__(self) -> None:
        self.answer: ClusterState | Exception = ClusterState("ready", "ready", "")

    async def push_samples(self, ingress_id: str, samples: tuple[Any, ...]) -> ClusterState:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("known", "shown"),
    [("ready", "degraded"), ("degraded", "degraded"), ("recovering", "recovering"), ("starting", "starting")],
)
async def test_a_silent_supervisor_is_shown_and_what_serves_goes_on(known: Any, shown: str) -> None:
    config = expand_demo(ClusterConfig(model="demo"))
    link = Link()
    service = Service(config, resolve_model(config.model), link)  # type: ignore[arg-type]
    service._follow.cancel()  # only this test asks
    link.answer = ClusterState(known, "as it was", "")
    await service.refresh()
    link.answer = RuntimeError("lost")
    await service.refresh()
    assert service.state.state == shown
    assert (service.state.phase == "the supervisor does not answer") == (known == "ready")
    link.answer = ClusterState("ready", "ready", "")
    await service.refresh()
    assert service.state.state == "ready"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/metrics"), ("GET", "/v1/experts"), ("POST", "/v1/cluster/rebalance")]
)
async def test_who_only_looks_does_not_wait_for_a_supervisor_that_hangs(
    open_api: Open, monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    monkeypatch.setattr(cluster_api, "REFRESH_TIMEOUT_S", 0.05)
    http = await open_api()
    service: Service = http.service  # type: ignore[attr-defined]
    service._follow.cancel()
    service.state = ClusterState("ready", "ready", "")
    for question in ("exposition", "experts", "rebalance"):
        monkeypatch.setattr(service.supervisor, question, lambda *_: asyncio.Event().wait(), raising=False)
    answer = await asyncio.wait_for(http.request(method, path, json={"dry_run": True}), 5)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert "has not answered within 0.05 s" in answer.json()["error"]["message"]


async def test_operators_see_load_and_placement_of_experts(open_api: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[ExpertsReport | None] = [None]

    async def experts() -> ExpertsReport | None:
        return known[0]

    http = await open_api()
    monkeypatch.setattr(http.service.supervisor, "experts", experts, raising=False)  # type: ignore[attr-defined]
    answer = await http.get("/v1/experts")
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "The expert map is not known yet")
    known[0] = ExpertsReport(((3, 1),), ((2, 0),), 300.0, 0.5, 7, (((0,), (1, 0)),))
    assert (await http.get("/v1/experts")).json() == {
        "layers": 1,
        "experts": 2,
        "counts": [[3, 1]],
        "recent_counts": [[2, 0]],
        "window_seconds": 300.0,
        "balancedness": 0.5,
        "map_version": 7,
        "placement": [[[0], [1, 0]]],
    }


@pytest.mark.parametrize(
    ("asked", "first", "shown"), [("1-2", 1, [[1], [2]]), ("2", 2, [[2]]), ("0-2", 0, [[0], [1], [2]])]
)
async def test_operators_may_ask_for_some_layers(
    open_api: Open, monkeypatch: pytest.MonkeyPatch, asked: str, first: int, shown: list[list[int]]
) -> None:
    async def experts() -> ExpertsReport:
        return ExpertsReport(((0,), (1,), (2,)), ((0,), (1,), (2,)), 300.0, 1.0, 7, (((0,),),) * 3)

    http = await open_api()
    monkeypatch.setattr(http.service.supervisor, "experts", experts, raising=False)  # type: ignore[attr-defined]
    answer = (await http.get("/v1/experts", params={"layers": asked})).json()
    assert (answer["layers"], answer["first_layer"]) == (3, first)
    assert answer["counts"] == answer["recent_counts"] == shown
    assert len(answer["placement"]) == len(shown)
    for wrong in ("3", "2-1", "x", "-1", "0-3", "1-"):
        refused = await http.get("/v1/experts", params={"layers": wrong})
        assert refused.status_code == 400
        assert f"layers={wrong!r} is not there: write one of 0 to 2" in refused.json()["error"]["message"]


async def test_operators_hear_from_a_supervisor_that_takes_over_to_ask_again() -> None:
    async def refuse() -> None:
        told = NotRunning("the cluster is recovering: config.json is missing")
        raise RayTaskError("scale", "a traceback", told).as_instanceof_cause()

    with pytest.raises(APIError) as raised:
        await answer_of(refuse())
    assert raised.value.status == 503
    assert raised.value.message == "the cluster is recovering: config.json is missing: ask again"
