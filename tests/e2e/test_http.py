"""The HTTP surface beside generation, the wire format of streams, and many requests at once."""

import asyncio
import json
from importlib.metadata import version
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import PREFIX, TABLE
from tests.e2e.collector import Collector
from tests.e2e.oracle import Oracle
from tests.e2e.servers import MODEL, Server, eventually

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "What is a front?"}]
RENDERED = (
    "<|start_of_role|>user<|end_of_role|>What is a front?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
)
GREEDY = {"temperature": 0, "ignore_eos": True}


def events(response: httpx.Response) -> list[str]:
    """The data of each server-sent event; checks the framing."""
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


class TestSmallEndpoints:
    def test_health(self, http: httpx.Client) -> None:
        response = http.get("/health")
        assert (response.status_code, response.json()["state"]) == (200, "ready")

    def test_ready(self, http: httpx.Client) -> None:
        response = http.get("/ready")
        assert (response.status_code, response.json()["state"]) == (200, "ready")

    def test_scrapers_keep_no_connection(self, http: httpx.Client) -> None:
        """Through Serve's proxy: a pod that drains waits for connections that are open."""
        assert http.get("/metrics").headers["connection"] == "close"
        assert "connection" not in http.get("/health").headers

    def test_version(self, http: httpx.Client) -> None:
        assert http.get("/version").json() == {"version": version("outcrop")}

    def test_models(self, http: httpx.Client, model_dir: Any) -> None:
        listed = http.get("/v1/models").json()
        assert listed["object"] == "list"
        [card] = listed["data"]
        assert (card["id"], card["root"], card["max_model_len"]) == (MODEL, str(model_dir), 2048)
        assert http.get(f"/v1/models/{MODEL}").json() == card

    @pytest.mark.parametrize("text", ["Hi", "naïve 東京 👩‍👩‍👧\r\n\t", "<|end_of_text|>literal", " leading", "\u0000"])
    def test_tokenize_and_back(self, http: httpx.Client, oracle: Oracle, text: str) -> None:
        answer = http.post("/tokenize", json={"model": MODEL, "prompt": text}).json()
        ids = oracle.encode(text)
        assert answer == {"count": len(ids), "max_model_len": 2048, "tokens": ids, "token_strs": None}
        assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}

    def test_tokenize_messages(self, http: httpx.Client, oracle: Oracle) -> None:
        answer = http.post("/tokenize", json={"messages": MESSAGES, "return_token_strs": True}).json()
        assert answer["tokens"] == oracle.encode(RENDERED)
        assert answer["token_strs"][0] == "<|start_of_role|>"

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/v1/nothing", 404),
            ("POST", "/", 405),
            ("GET", "/v1/models/gpt-9", 404),
            ("GET", "/v1/models/%00%ff", 404),
            ("GET", COMPLETIONS, 405),
            ("DELETE", CHAT, 405),
            ("PUT", "/health", 405),
            ("OPTIONS", "/v1/models", 405),
        ],
    )
    def test_unknown_routes_and_methods_answer_in_openais_shape(
        self, http: httpx.Client, method: str, path: str, status: int
    ) -> None:
        response = http.request(method, path)
        assert response.status_code == status
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert status != 405 or response.headers["allow"] in ("GET", "POST")


class TestCluster:
    def test_every_actor_is_listed(self, http: httpx.Client, server: Server) -> None:
        cluster = http.get("/v1/cluster").json()
        assert (cluster["model"], cluster["state"], cluster["map_version"]) == (MODEL, "ready", 1)
        [front] = cluster["fronts"]
        assert [(r["id"], r["group"]) for r in cluster["replicas"]] == [("expert-g0-r0", 0), ("expert-g1-r0", 1)]
        pids = {process.pid for process in server.processes()}
        for row in (front, *cluster["replicas"]):
            assert (row["state"], row["map_version"]) == ("ready", 1)
            assert row["pid"] in pids
            assert row["weight_bytes"] > 0

    def test_expert_counts_grow_by_top_k_for_each_computed_token(self, http: httpx.Client) -> None:
        before = http.get("/v1/experts").json()
        prompt = [7] * 5 + [9] * 6  # shorter than a block: nothing of it can be cached
        http.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": 4} | GREEDY).raise_for_status()
        after = http.get("/v1/experts").json()
        assert (after["layers"], after["experts"], after["map_version"]) == (6, 8, 1)
        assert [len(layer) for layer in after["counts"]] == [8] * 6
        grown = [sum(new) - sum(old) for new, old in zip(after["counts"], before["counts"], strict=True)]
        assert grown == [2 * (len(prompt) + 3)] * 6, "the last token is never computed"
        assert 0 < after["balancedness"] <= 1
        assert after["placement"] == [[[0]] * 4 + [[1]] * 4] * 6


class TestMetrics:
    def test_every_metric_of_the_table_is_there(self, http: httpx.Client) -> None:
        response = http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=")
        families = {family.name: family for family in text_string_to_metric_families(response.text)}
        for definition in TABLE:
            family = families.pop(PREFIX + definition.name.removesuffix("_total"))
            assert (family.type, family.documentation) == (definition.kind, definition.help)
        assert not families, "metrics outside the table"

    def test_counters_move_with_a_request(self, http: httpx.Client, server: Server) -> None:
        before = server.samples()
        http.post(COMPLETIONS, json={"prompt": [5] * 7, "max_tokens": 9} | GREEDY).raise_for_status()
        after = server.samples()

        def moved(name: str, **labels: str) -> float:
            key = (PREFIX + name, frozenset(labels.items()))
            return after[key] - before.get(key, 0.0)

        assert moved("prompt_tokens_total") == 7
        assert moved("generation_tokens_total") == 9
        assert moved("request_success_total", finished_reason="length") == 1
        assert moved("time_to_first_token_seconds_count") == 1
        assert moved("inter_token_latency_seconds_count") == 8
        assert moved("e2e_request_latency_seconds_count") == 1
        assert moved("request_queue_time_seconds_count") == 1
        assert moved("step_tokens_count") == moved("step_seconds_count") == 9
        assert moved("step_tokens_sum") == 15
        assert moved("expert_tokens_total", group="0", replica="expert-g0-r0") > 0
        assert after[PREFIX + "expert_replicas", frozenset({("group", "1"), ("state", "ready")})] == 1
        assert after[PREFIX + "expert_map_version", frozenset()] == 1


class TestServerSentEvents:
    @pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
    def test_the_wire_format(self, http: httpx.Client, path: str) -> None:
        body = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5} | GREEDY
        prompt = {"prompt": "Hi"} if path == COMPLETIONS else {"messages": MESSAGES}
        response = http.post(path, json=body | prompt)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        *chunks, usage, done = events(response)
        assert done == "[DONE]"
        parsed = [json.loads(chunk) for chunk in (*chunks, usage)]
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in parsed}) == 1
        assert {chunk["object"] for chunk in parsed} == {
            "text_completion" if path == COMPLETIONS else "chat.completion.chunk"
        }
        assert [chunk["choices"][0]["finish_reason"] for chunk in parsed[:-1]] == [None] * (len(chunks) - 1) + [
            "length"
        ]
        assert (parsed[-1]["choices"], parsed[-1]["usage"]["completion_tokens"]) == ([], 5)

    def test_an_error_before_the_first_token_is_no_stream(self, http: httpx.Client) -> None:
        response = http.post(COMPLETIONS, json={"prompt": "Hi", "stream": True, "max_tokens": 10**6})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"


def mixed_requests() -> list[tuple[str, dict[str, Any]]]:
    """24 greedy requests: both endpoints, streamed or not, short and long, some with a common prefix."""
    requests: list[tuple[str, dict[str, Any]]] = []
    for n in range(24):
        body = {"max_tokens": 6 + n, "stream": n % 3 == 0} | GREEDY
        text = "Shared by all of them, longer than a block of the cache. " * (n % 2) + f"Number {n}"
        if n % 4 == 0:
            requests.append((CHAT, body | {"messages": [{"role": "user", "content": text}]}))
        else:
            requests.append((COMPLETIONS, body | {"prompt": text}))
    return requests


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        *chunks, done = events(response)
        assert done == "[DONE]"
        choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
        return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)
    choice = response.json()["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


async def test_24_requests_at_once_answer_as_each_alone(http: httpx.Client, server: Server) -> None:
    alone = [text_of(http.post(path, json=body)) for path, body in mixed_requests()]
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
        together = await asyncio.gather(*(client.post(path, json=body) for path, body in mixed_requests()))
    assert [text_of(response) for response in together] == alone
    assert len(set(alone)) == 24
    server.wait_idle()


def test_the_request_id_of_a_client_comes_back_and_a_bad_one_is_replaced(http: httpx.Client) -> None:
    body = {"prompt": "Hi", "max_tokens": 2, "temperature": 0}
    for _ in range(2):  # the same id twice is no mistake
        answer = http.post("/v1/completions", json=body, headers={"X-Request-Id": "trace-7"})
        assert answer.headers["x-request-id"] == "trace-7"
        assert answer.json()["id"] == "cmpl-trace-7"
    answer = http.post("/v1/completions", json=body, headers={"X-Request-Id": "a b"})
    assert answer.status_code == 200
    assert " " not in answer.json()["id"]


def test_without_an_id_the_one_that_serve_makes_up_is_ours(http: httpx.Client, server: Server) -> None:
    """What a user quotes from the answer's header finds the log line."""
    answer = http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2})
    request_id = answer.headers["x-request-id"]
    assert answer.json()["id"] == f"cmpl-{request_id}"
    eventually(lambda: f"request_id={request_id}" in server.ray_logs(), "the log names it")


def test_no_trace_is_sent_unless_it_is_asked_for(
    http: httpx.Client, server: Server, unwanted_traces: Collector
) -> None:
    """OpenTelemetry's own variable, which the server's environment has, may be there for other programs."""
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"X-Request-Id": "quiet", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    http.post(COMPLETIONS, json={"prompt": "Hi", "max_tokens": 2}, headers=headers)
    eventually(lambda: "request_id=quiet" in server.ray_logs(), "the log names it")
    assert trace not in server.ray_logs()
    assert unwanted_traces.num_requests == 0
