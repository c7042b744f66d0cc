"""A server with a key, a short queue, small bodies and two ingress replicas: what it refuses, and that it recovers."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.servers import Samples, Server, eventually, serving

COMPLETIONS = "/v1/completions"
KEY = "schlüssel-0123"
SHORT: dict[str, Any] = {"prompt": "Hi", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
LONG = SHORT | {"max_tokens": 2000}
MIB = 2**20


def bearer(key: str) -> dict[str, bytes]:
    """As bytes: what a client writes is UTF-8, and HTTP headers have no encoding."""
    return {"Authorization": b"Bearer " + key.encode()}


FOREVER = """\
{% if messages[0].content == 'forever' %}
{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{% endif %}
{{ messages[0].content }}"""

WRONG_KEYS = {
    "none": {},
    "wrong": bearer("wrong"),
    "longer": bearer(KEY + "x"),
    "not ASCII": bearer("schlüssel-9999"),
    "not UTF-8": {"Authorization": b"Bearer \xff\xfe"},
    "empty": {"Authorization": b"Bearer"},
    "basic": {"Authorization": b"Basic " + KEY.encode()},
    "no scheme": {"Authorization": KEY.encode()},
}


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    layout = ["--groups", "1", "--replicas", "2", "--ingress-replicas", "2", "--lane", "object_ref"]
    template = tmp_path_factory.mktemp("template") / "forever.jinja"
    template.write_text(FOREVER)
    limits = f"--dtype float32 --max-num-seqs 1 --max-num-waiting 2 --max-body-mib 1 --api-key {KEY}".split()
    limits += ["--chat-template", str(template)]
    with serving(model_dir, *layout, *limits) as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers=bearer(KEY), timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
async def crowd(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, headers=bearer(KEY), timeout=60, trust_env=False) as client:
        yield client


class TestKey:
    @pytest.mark.parametrize("name", WRONG_KEYS)
    def test_without_the_key_what_computes_is_closed(self, server: Server, name: str) -> None:
        headers = WRONG_KEYS[name]
        for response in (
            server.get("/v1/models", headers=headers),
            httpx.post(server.url + COMPLETIONS, headers=headers),
            httpx.post(server.url + "/tokenize", headers=headers),
            httpx.post(server.url + "/detokenize", headers=headers),
        ):
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"

    def test_with_the_key_it_is_open(self, http: httpx.Client, server: Server) -> None:
        assert http.get("/v1/models").status_code == 200
        assert http.post(COMPLETIONS, json=SHORT).status_code == 200
        assert server.get("/v1/models", headers={"Authorization": b"bearer  " + KEY.encode()}).status_code == 200

    @pytest.mark.parametrize("path", ["/health", "/metrics", "/version"])
    def test_probes_need_no_key(self, server: Server, path: str) -> None:
        assert server.get(path).status_code == 200

    def test_the_key_is_not_told(self, server: Server, http: httpx.Client) -> None:
        told = [server.log, server.ray_logs(), http.get("/v1/cluster").text]
        assert not any(KEY in text for text in told)
        assert not any(KEY in word for p in server.processes()[1:] for word in p.cmdline())


class TestBodies:
    def test_bodies_above_the_limit(self, http: httpx.Client) -> None:
        body = json.dumps(SHORT).encode()
        json_body = {"Content-Type": "application/json"}
        assert http.post(COMPLETIONS, content=body.ljust(MIB), headers=json_body).status_code == 200
        response = http.post(COMPLETIONS, content=body.ljust(MIB + 1))
        assert response.status_code == 413
        assert "max_body_mib" in response.json()["error"]["message"]
        assert http.post("/tokenize", content=body.ljust(2 * MIB)).status_code == 413


async def test_a_template_that_never_ends_holds_up_only_who_asked_for_it(
    server: Server, crowd: httpx.AsyncClient
) -> None:
    def chat(text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}], "max_tokens": 2, "ignore_eos": True}

    async def ask(text: str) -> httpx.Response:
        return await crowd.post("/v1/chat/completions", json=chat(text))

    await asyncio.gather(*(ask("Hi") for _ in range(4)))  # a process for each is there from now on
    hanging = [asyncio.create_task(ask("forever")) for _ in range(2)]
    num_answered = 0
    while not any(task.done() for task in hanging):
        assert (await crowd.get("/health")).status_code == 200
        assert (await ask("Hi")).status_code == 200
        num_answered += not any(task.done() for task in hanging)
    assert num_answered > 0, "others have waited for them"
    for answer in await asyncio.gather(*hanging):
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"], "of a processor" in error["message"]) == ("messages", True)


async def reaches(server: Server, gauge: str, value: float) -> None:
    """In a thread, so that requests of this event loop go on."""
    await asyncio.to_thread(eventually, lambda: server.metric(gauge) == value, f"{gauge} {value}")


class TestOverload:
    """One sequence runs, two wait."""

    async def fill(self, server: Server, crowd: httpx.AsyncClient) -> list["asyncio.Task[httpx.Response]"]:
        """One after the other, so that all three are taken."""
        tasks = []
        for gauge, value in (("num_requests_running", 1), ("num_requests_waiting", 1), ("num_requests_waiting", 2)):
            tasks.append(asyncio.create_task(crowd.post(COMPLETIONS, json=LONG)))
            await reaches(server, gauge, value)
        return tasks

    async def leave(self, tasks: list["asyncio.Task[httpx.Response]"]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_full_queue_answers_429_and_recovers(
        self, server: Server, crowd: httpx.AsyncClient, stream: bool
    ) -> None:
        tasks = await self.fill(server, crowd)
        before = server.metric("requests_failed_total", reason="overloaded")
        refused = await crowd.post(COMPLETIONS, json=LONG | {"stream": stream})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        eventually(lambda: server.metric("requests_failed_total", reason="overloaded") == before + 1, "counted")
        assert server.get("/health").status_code == 200, "overloaded is not ill"
        await self.leave(tasks)
        server.wait_idle()
        await asyncio.sleep(int(refused.headers["retry-after"]))  # an ingress does not ask a full front again at once
        assert (await crowd.post(COMPLETIONS, json=SHORT)).status_code == 200

    async def test_who_leaves_the_queue_makes_room(self, server: Server, crowd: httpx.AsyncClient) -> None:
        tasks = await self.fill(server, crowd)
        await self.leave(tasks[1:2])
        await reaches(server, "num_requests_waiting", 1)
        late = asyncio.create_task(crowd.post(COMPLETIONS, json=SHORT))
        await reaches(server, "num_requests_waiting", 2)
        await self.leave([tasks[0], tasks[2]])
        assert (await late).status_code == 200
        server.wait_idle()

    async def test_a_burst_is_served_or_refused_but_never_broken(
        self, server: Server, crowd: httpx.AsyncClient
    ) -> None:
        bodies = [SHORT | {"max_tokens": 60, "stream": n % 2 == 0} for n in range(24)]
        answers = await asyncio.gather(*(crowd.post(COMPLETIONS, json=body) for body in bodies))
        found = {answer.status_code for answer in answers}
        assert found == {200, 429}
        assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
        server.wait_idle()

    async def test_all_choices_of_a_request_are_taken_or_none(self, server: Server, crowd: httpx.AsyncClient) -> None:
        refused = await crowd.post(COMPLETIONS, json=LONG | {"n": 8})
        assert refused.status_code == 429
        server.wait_idle()


def told_alike(server: Server) -> Samples:
    """What a dozen looks tell alike, as they do once both replicas have pushed their samples: once a second."""
    answers: list[Samples] = []

    def agree() -> bool:
        answers[:] = [server.samples() for _ in range(12)]
        return all(answer == answers[0] for answer in answers)

    eventually(agree, "both replicas tell the same")
    return answers[0]


class TestTwoIngressReplicas:
    def test_every_replica_tells_the_same_metrics(self, server: Server, http: httpx.Client) -> None:
        replicas = [p for p in server.processes() if "ServeReplica:outcrop:ingress" in " ".join(p.cmdline())]
        assert len(replicas) == 2
        counted = "outcrop_request_success_total", frozenset({("finished_reason", "length")})
        before = told_alike(server)[counted]
        for _ in range(8):
            with httpx.Client(base_url=server.url, headers=bearer(KEY)) as client:
                client.post(COMPLETIONS, json=SHORT).raise_for_status()
        server.wait_idle()
        eventually(lambda: told_alike(server)[counted] == before + 8, "all are counted")
