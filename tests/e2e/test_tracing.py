"""Traces and log lines of a live server: from a request's id to its spans, its front and its replicas."""

import json
import os
import re
import signal
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.e2e.collector import Collector, attributes
from tests.e2e.servers import Server, eventually

COMPLETIONS = "/v1/completions"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def server(watched: Server) -> Server:
    return watched


def generate(server: Server, request_id: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    body = {"prompt": "What is a front?", "temperature": 0, "ignore_eos": True} | body
    with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client:
        return client.post(COMPLETIONS, json=body, headers={"X-Request-Id": request_id} | headers)


def trace_of(collector: Collector, request_id: str) -> tuple[Span, list[Span]]:
    """The request's own span, which is sent after all of its children."""
    eventually(lambda: collector.root(request_id) is not None, f"the collector has {request_id}")
    root = collector.root(request_id)
    assert root is not None
    return root, collector.children(root)


def check_nested(root: Span, children: list[Span]) -> None:
    for child in children:
        assert root.start_time_unix_nano <= child.start_time_unix_nano <= child.end_time_unix_nano
        assert child.end_time_unix_nano <= root.end_time_unix_nano


def lines(text: str) -> list[dict[str, Any]]:
    found = (line[line.find('{"time"') :] for line in text.splitlines() if '{"time"' in line)
    return [json.loads(line) for line in found]


class TestSpans:
    def test_a_request_of_two_choices_is_one_trace(self, server: Server, collector: Collector) -> None:
        body = {"max_tokens": 8, "n": 2}
        usage = generate(server, "two", body, traceparent=f"00-{TRACE}-{CALLER}-01").json()["usage"]
        root, children = trace_of(collector, "two")
        assert (root.name, root.trace_id.hex(), root.parent_span_id.hex()) == ("llm_request", TRACE, CALLER)
        check_nested(root, children)
        found = attributes(root)
        assert found["gen_ai.usage.prompt_tokens"] == usage["prompt_tokens"]
        assert found["gen_ai.usage.completion_tokens"] == usage["completion_tokens"] == 16
        assert found["gen_ai.response.finish_reasons"] == ["length"] * 2
        assert found["http.response.status_code"] == 200
        assert 0 < found["gen_ai.latency.time_to_first_token"] <= found["gen_ai.latency.e2e"]
        assert collector.services == {"outcrop"}
        assert children[0].name == "tokenise"
        for choice in range(2):
            mine = [child for child in children if attributes(child).get("outcrop.choice") == choice]
            assert [child.name for child in mine] == ["queue", "prefill", "decode"]
            prefill, decode = attributes(mine[1]), attributes(mine[2])
            assert (prefill["outcrop.num_steps"], decode["outcrop.num_steps"]) == (1, 7)
            seconds = (mine[2].end_time_unix_nano - mine[2].start_time_unix_nano) / 1e9
            assert 0 < decode["outcrop.expert_wait_seconds"] < seconds
            assert decode["outcrop.expert_compute_seconds"] > 0
            assert {decode[f"outcrop.num_{name}"] for name in ("failovers", "local_tokens")} == {0}

    def test_a_stream_lasts_to_its_end(self, server: Server, collector: Collector) -> None:
        generate(server, "stream", {"max_tokens": 20, "stream": True})
        root, children = trace_of(collector, "stream")
        check_nested(root, children)
        assert [child.name for child in children] == ["tokenise", "queue", "prefill", "decode"]
        assert attributes(root)["gen_ai.usage.completion_tokens"] == 20
        assert root.parent_span_id == b""

    def test_what_the_ingress_ends_and_what_a_client_leaves(self, server: Server, collector: Collector) -> None:
        text = generate(server, "whole", {"max_tokens": 8}).json()["choices"][0]["text"]
        generate(server, "stopped", {"max_tokens": 8, "stop": text[2:4]})
        root, children = trace_of(collector, "stopped")
        assert attributes(root)["gen_ai.response.finish_reasons"] == ["stop"]
        check_nested(root, children)
        body = {"prompt": "Hi", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx.stream(
            "POST", server.url + COMPLETIONS, json=body, headers={"X-Request-Id": "left"}, timeout=60, trust_env=False
        ) as response:
            next(response.iter_lines())
        root, children = trace_of(collector, "left")
        assert attributes(root)["gen_ai.response.finish_reasons"] == ["abort"]
        check_nested(root, children)

    def test_a_refusal_is_a_span_of_its_own(self, server: Server, collector: Collector) -> None:
        generate(server, "refused", {"max_tokens": -1})
        root, children = trace_of(collector, "refused")
        assert (attributes(root)["http.response.status_code"], children) == (400, [])

    def test_what_the_caller_does_not_sample_is_not_sent(self, server: Server, collector: Collector) -> None:
        generate(server, "unsampled", {"max_tokens": 2}, traceparent=f"00-{'1' * 32}-{CALLER}-00")
        generate(server, "after", {"max_tokens": 2})
        trace_of(collector, "after")
        assert collector.root("unsampled") is None
        assert not [span for span in collector.spans if span.trace_id.hex() == "1" * 32]


def followed(server: Server) -> tuple[list[dict[str, Any]], list[set[str]]]:
    """The lines about steps of the request "followed"; and for each, of which groups a replica has told of the step."""
    told = lines(server.actor_logs())
    steps = [line for line in told if any(i.startswith("followed-") for i in line.get("request_ids", ()))]
    groups = []
    for step in steps:
        replicas = [line["process"] for line in told if line["step"] == step["step"] and line not in steps]
        assert len(set(replicas)) == len(replicas), "one line for each step"
        groups.append({name.partition("-r")[0] for name in replicas})
    return steps, groups


class TestLogs:
    def test_from_a_request_to_the_lines_of_its_replicas(self, server: Server, collector: Collector) -> None:
        generate(server, "followed", {"max_tokens": 4})
        root, _ = trace_of(collector, "followed")
        logged = lambda: [line for line in lines(server.ray_logs()) if line.get("request_id") == "followed"]  # noqa: E731
        eventually(lambda: bool(logged()), "Serve's log names it")
        (finished,) = logged()
        assert (finished["trace_id"], finished["front"]) == (root.trace_id.hex(), "front-0")
        eventually(lambda: followed(server)[1] == [{"expert-g0", "expert-g1"}] * 4, "both groups tell of 4 steps")
        steps, _ = followed(server)
        assert {line["process"] for line in steps} == {"front-0"}
        assert all(re.fullmatch(r"front-0:\d+", line["step"]) for line in steps)

    def test_a_failover_names_the_requests_and_shows_in_their_trace(self, server: Server, collector: Collector) -> None:
        victim = next(a for a in server.get("/v1/cluster").json()["replicas"] if a["id"] == "expert-g0-r0")
        body = {"prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream(
            "POST", server.url + COMPLETIONS, json=body, headers={"X-Request-Id": "hit"}, timeout=120, trust_env=False
        ) as response:
            events = response.iter_lines()
            next(events)
            os.kill(victim["pid"], signal.SIGKILL)
            assert sum("[DONE]" in event for event in events) == 1
        _, children = trace_of(collector, "hit")
        assert attributes(children[-1])["outcrop.num_failovers"] == 1
        (given_up,) = [line for line in lines(server.actor_logs()) if "is given up" in line["message"]]
        assert victim["id"] in given_up["message"]
        assert [i.partition("-")[0] for i in given_up["request_ids"]] == ["hit"]
