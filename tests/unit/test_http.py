"""The HTTP side around a cluster that is not there: who is answered, and what is counted."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from cluster.messages.state import ClusterState
from deploy.ingress.fronts import client as front_client
from deploy.ingress.service import Service
from tests.unit.fake_front import FakeFront, fronts_state
from tests.unit.fake_supervisor import COMPLETIONS, JSON, Open
from tests.unit.front_cluster import until

GOOD = b'{"prompt": "Hi"}'


def failed(http: httpx.AsyncClient, reason: str) -> float:
    samples = http.service.metrics.samples()  # type: ignore[attr-defined]
    return {(name, labels): value for name, labels, value in samples}[
        "outcrop_requests_failed_total", (("reason", reason),)
    ]


class TestHosts:
    @pytest.mark.parametrize(
        ("host", "status"),
        [
            ("127.0.0.1:8000", 200), ("localhost", 200), ("LocalHost:8000", 200), ("[::1]:8000", 200),
            ("10.1.2.3", 200), ("localhost.:80", 200), ("page.localhost:8000", 200), ("", 200), ("api.example", 200),
            ("evil.example", 421), ("evil.example:8000", 421), ("127.0.0.1.evil.example", 421), ("localhost.evil", 421),
            ("evil.example#localhost", 421), ("localhost@evil.example", 421), ("xlocalhost", 421), ("*", 421),
        ],
    )  # fmt: skip
    async def test_names_that_may_be_anyones(self, open_api: Open, host: str, status: int) -> None:
        http = await open_api(allowed_hosts=["api.example"])
        answer = await http.get("/version", headers={"Host": host})
        assert answer.status_code == status
        assert status == 200 or "allowed_hosts" in answer.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("allowed", "host", "status"),
        [("*.a.example", "b.a.example", 200), ("*.a.example", "a.example", 421), ("*", "evil.example", 200)],
    )
    async def test_patterns(self, open_api: Open, allowed: str, host: str, status: int) -> None:
        http = await open_api(allowed_hosts=allowed)
        assert (await http.get("/version", headers={"Host": host})).status_code == status

    async def test_unless_told_nothing_is_known_of_names(self, open_api: Open) -> None:
        assert (await (await open_api()).get("/version", headers={"Host": "a.example"})).status_code == 200


class TestOrigins:
    @pytest.mark.parametrize(
        ("origin", "status"),
        [
            (None, 503), ("http://127.0.0.1:8000", 503), ("https://127.0.0.1:8000", 503),
            ("HTTP://127.0.0.1:8000", 503),
            ("http://127.0.0.1", 403), ("http://127.0.0.1:8001", 403), ("http://evil.example", 403), ("null", 403),
            ("http://127.0.0.1:8000.evil.example", 403), ("http://evil.example@127.0.0.1:8000", 403), ("", 403),
            ("http://[", 403), ("x", 403), ("http://127.0.0.1:8000, http://evil.example", 403),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("path", [COMPLETIONS, "/v1/cluster/scale"])
    async def test_pages_of_others(self, open_api: Open, path: str, origin: str | None, status: int) -> None:
        http, body = await open_api(), GOOD if path == COMPLETIONS else b'{"replicas": 2}'
        answer = await http.post(path, content=body, headers=JSON | ({} if origin is None else {"Origin": origin}))
        assert answer.status_code == status
        assert status != 403 or "allowed_origins" in answer.json()["error"]["message"]
        assert "access-control-allow-origin" not in answer.headers

    async def test_they_learn_nothing(self, open_api: Open) -> None:
        http = await open_api()
        for path in ("/", "/v1/models", "/v1/cluster", "/health", "/metrics"):
            assert (await http.get(path, headers={"Origin": "http://evil.example"})).status_code == 403

    async def test_an_allowed_page_may_ask_and_read(self, open_api: Open) -> None:
        http = await open_api(allowed_origins="https://chat.example", api_key="k")
        ours, evil = {"Origin": "https://chat.example"}, {"Origin": "https://evil.example"}
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        allowed = await http.options(COMPLETIONS, headers=ours | ask)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        assert allowed.headers["access-control-allow-headers"] == "authorization,content-type"
        assert (await http.options(COMPLETIONS, headers=evil | ask)).status_code == 403
        assert (await http.get("/version", headers=ours)).headers[
            "access-control-allow-origin"
        ] == "https://chat.example"
        refused = await http.post(COMPLETIONS, headers=ours)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://chat.example")

    @pytest.mark.parametrize("media_type", [None, "text/plain", "application/x-www-form-urlencoded", "json"])
    async def test_only_json_is_read(self, open_api: Open, media_type: str | None) -> None:
        headers = {} if media_type is None else {"Content-Type": media_type}
        http = await open_api()
        answer = await http.post(COMPLETIONS, content=GOOD, headers=headers)
        assert answer.status_code == 415
        assert "send the header `Content-Type: application/json`" in answer.json()["error"]["message"]
        json_like = {"Content-Type": "Application/JSON ; charset=utf-8"}
        assert (await http.post(COMPLETIONS, content=GOOD, headers=json_like)).status_code == 503


@pytest.mark.parametrize(("path", "body"), [("/tokenize", GOOD), ("/detokenize", b'{"tokens": [1]}')])
async def test_what_computes_needs_the_key(open_api: Open, path: str, body: bytes) -> None:
    http = await open_api(api_key="secret")
    assert (await http.post(path, content=body, headers=JSON)).status_code == 401
    with_key = JSON | {"Authorization": "Bearer secret"}
    assert (await http.post(path, content=body, headers=with_key)).status_code == 200


class TestFailuresAreCounted:
    @pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions"])
    async def test_an_outage(self, open_api: Open, path: str) -> None:
        http = await open_api()
        body = {"prompt": "Hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hi"}]}
        assert (await http.post(path, json=body)).status_code == 503
        assert failed(http, "unavailable") == 1

    async def test_who_only_looks_is_no_outage(self, open_api: Open) -> None:
        http = await open_api()
        assert (await http.get("/health")).status_code == 503
        assert failed(http, "unavailable") == 0

    @pytest.mark.parametrize("is_stream", [False, True])
    async def test_a_front_that_is_lost_for_long(
        self, open_api: Open, monkeypatch: pytest.MonkeyPatch, short_waits: None, is_stream: bool
    ) -> None:
        front = FakeFront()
        monkeypatch.setattr(front_client.ray, "get_actor", lambda *_: front)
        http = await open_api()
        service: Service = http.service  # type: ignore[attr-defined]
        service._follow.cancel()
        service.state = fronts_state(a=front)
        service.client.update(service.state)
        body = {"prompt": "Hi", "stream": is_stream, "max_tokens": 9}
        asking = asyncio.create_task(http.post(COMPLETIONS, json=body))
        await until(lambda: bool(front.taken))
        front.say(front.taken[0], 5)
        front.die()
        answer = await asyncio.wait_for(asking, 5)
        assert answer.status_code == (200 if is_stream else 503)
        assert '"code":"unavailable"' in answer.text
        assert "[DONE]" not in answer.text
        assert [failed(http, reason) for reason in ("unavailable", "engine", "internal")] == [1, 0, 0]

    async def test_an_error_of_ours(self, open_api: Open) -> None:
        http = await open_api()
        assert (await http.get("/metrics")).status_code == 500
        assert failed(http, "internal") == 1

    async def test_not_those_of_clients(self, open_api: Open) -> None:
        http = await open_api()
        for body in (b"{", b"{}", b'{"prompt": 1}'):
            assert (await http.post(COMPLETIONS, content=body, headers=JSON)).status_code == 400
        assert [failed(http, reason) for reason in ("engine", "overloaded", "unavailable", "internal")] == [0] * 4


class FrontIsThere:
    is_open, is_draining, is_doubtful, outstanding_tokens = True, False, False, 0


async def test_who_has_been_ready_takes_requests_until_the_end(open_api: Open) -> None:
    """While no front is there, requests wait: a load balancer is to send them all the same."""
    http = await open_api()
    service: Service = http.service  # type: ignore[attr-defined]
    service._follow.cancel()

    async def ready(state: str, has_front: bool) -> tuple[int, int]:
        service.supervisor.push_samples = answering(state)  # type: ignore[method-assign]
        service.client.update = lambda _: None  # type: ignore[assignment,misc,return-value]
        service.client._links = {"front-0": FrontIsThere()} if has_front else {}  # type: ignore[dict-item]
        await service.refresh()
        return (await http.get("/health")).status_code, (await http.get("/ready")).status_code

    assert await ready("recovering", False) == (503, 503)
    assert await ready("ready", True) == (200, 200)
    assert await ready("recovering", False) == (503, 200)
    assert await ready("stopping", False) == (503, 503)


def answering(state: str) -> Callable[..., Awaitable[ClusterState]]:
    async def push_samples(*_: Any) -> ClusterState:
        return ClusterState(state, "a phase", "")  # type: ignore[arg-type]

    return push_samples
