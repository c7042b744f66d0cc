"""Two thousand odd requests to all routes, eight at a time, always the same ones: no 5xx, no hang, nothing leaked."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.e2e.servers import Server

AT_ONCE, ROUNDS = 8, 250
TIMEOUT_S = 30.0
GREEDY = {"max_tokens": 2, "temperature": 0}
HI = [{"role": "user", "content": "Hi"}]

# POST routes with a body that is answered by 200. Those of operators get an unknown field: they must do nothing.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi", "n": 1, "stop": ["x"], "logprobs": 1, "stream": False} | GREEDY,
    "/v1/chat/completions": {"messages": HI, "stream": True, "seed": 1, "logit_bias": {"5": 1}} | GREEDY,
    "/v1/responses": {"input": "Hi", "max_output_tokens": 2, "temperature": 0, "store": False},
    "/v1/embeddings": {"input": "Hi", "pooling": "mean", "dimensions": 3},
    "/tokenize": {"prompt": "Hi", "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/v1/cluster/scale": {"group": "all", "replicas": 1, "fuzz": 1},
    "/v1/cluster/rebalance": {"dry_run": True, "force": False, "fuzz": 1},
}
PAGES = [
    "/",
    "/health",
    "/metrics",
    "/version",
    "/v1/models",
    "/v1/models/tiny",
    "/v1/cluster",
    "/v1/experts",
    "/docs",
    "/openapi.json",
    "/nowhere",
]
OTHER_FIELDS = [
    "max_tokens", "max_completion_tokens", "top_p", "top_k", "min_p", "seed", "best_of", "min_tokens", "echo", "suffix",
    "stop_token_ids", "ignore_eos", "presence_penalty", "repetition_penalty", "prompt_logprobs", "stream_options",
    "return_token_ids", "return_routed_experts", "user", "tools", "response_format", "continue_final_message",
    "add_generation_prompt", "top_logprobs", "tool_choice", "parallel_tool_calls", "structured_outputs",
    "prompt_embeds",
    "model", "messages", "prompt", "__class__", "",
]  # fmt: skip

odd_text = st.sampled_from(
    ["", "\0", "\ud800", "naïve 東京 👩‍👩‍👧", "\u202e\ufffe", "a" * 5000, "{{ 7 * 7 }}", "<|end_of_text|>"]
)
odd_numbers = st.sampled_from(
    [-1, 0, 1, 2, 263, 264, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**40, 0.5, -0.0, 1e-320, 1e308, 1e999]
)
odd_values = st.recursive(
    st.none() | st.booleans() | odd_numbers | odd_text | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text | st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
headers = st.fixed_dictionaries(
    {},
    optional={
        "Content-Type": st.sampled_from(
            [b"text/plain", b"", b"application/json; charset=latin-1", b"\xff", b"a" * 3000]
        ),
        "Host": st.sampled_from(
            [b"localhost", b"evil.example", b"[::1", b"\xc3\xa4", b":::", b"[]", b"localhost:99999"]
        ),
        "Origin": st.sampled_from([b"null", b"http://evil.example", b"http://[", b"\xff", b"", b"file://"]),
        # Not b"\xff": Serve's proxy answers 500 to an id that is no UTF-8, before it asks us.
        "X-Request-Id": st.sampled_from([b"team/0", b"", b"a b", b"\xc3\xa4", b"x" * 4000, b"same"]),
        "Authorization": st.sampled_from([b"Bearer", b"Bearer \xff", b"Basic eDp5", b""]),
        "Content-Encoding": st.sampled_from([b"gzip", b"br"]),
        "Accept": st.sampled_from([b"text/event-stream", b"*/*;q=x"]),
        "traceparent": st.sampled_from([b"00-" + b"f" * 32 + b"-" + b"f" * 16 + b"-01", b"x"]),
    },
)


@dataclass(frozen=True)
class Case:
    method: str
    path: str
    content: bytes = b""
    headers: dict[str, bytes] = field(default_factory=dict)


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    """A good body with up to two fields changed; sometimes with up to two bytes changed, and cut off somewhere."""
    body = dict(BODIES[path])
    for name in draw(st.lists(st.sampled_from([*body, *OTHER_FIELDS]), max_size=2)):
        if name != "fuzz":
            body[name] = draw(odd_values)
    for limit in ("max_tokens", "max_completion_tokens"):  # null is as none: until the context is full
        if limit in body and body[limit] in (None, 263, 264):
            body[limit] = 2
    raw = bytearray(json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    if draw(st.integers(0, 3)) == 0:
        for at in draw(st.lists(st.integers(0, len(raw) - 1), max_size=2)):
            raw[at] = draw(st.integers(0, 255))
        raw = raw[: draw(st.integers(1, len(raw)))]
    return bytes(raw)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.integers(0, 9))
    given_headers = draw(headers) if kind in (0, 1, 2) else {}
    if kind == 0:
        path = draw(
            st.sampled_from([*BODIES, *PAGES]) | st.text(max_size=8).map(lambda text: f"/v1/models/{quote(text)}")
        )
        return Case(draw(st.sampled_from(["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "x"])), path, b"", given_headers)
    path = draw(st.sampled_from(sorted(BODIES)))
    return Case("POST", path, draw(bodies(path)), {"Content-Type": b"application/json"} | given_headers)


@pytest.fixture(scope="module")
def senders(server: Server) -> Iterator[tuple[httpx.Client, ThreadPoolExecutor]]:
    with (
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S, trust_env=False) as client,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        yield client, pool


found: Counter[int] = Counter()


@settings(
    max_examples=ROUNDS,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(batch=st.lists(cases(), min_size=AT_ONCE, max_size=AT_ONCE))
def test_odd_requests_are_answered(senders: tuple[httpx.Client, ThreadPoolExecutor], batch: list[Case]) -> None:
    client, pool = senders

    def send(case: Case) -> httpx.Response:
        return client.request(case.method, case.path, content=case.content, headers=case.headers)

    for case, answer in zip(batch, pool.map(send, batch), strict=True):
        found[answer.status_code] += 1
        is_unavailable = answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable"
        assert answer.status_code < 500 or is_unavailable, (case, answer.text)


def test_afterwards_nothing_is_left(server: Server) -> None:
    assert found.total() >= AT_ONCE * ROUNDS
    assert found[200] > 200, found
    assert found[400] > 500, found
    server.wait_idle()
    server.check_integrity()
    cluster = server.get("/v1/cluster").json()
    assert (cluster["state"], cluster["wanted"]) == ("ready", {"fronts": 1, "replicas": [1, 1]})
    assert server.metric("requests_failed_total", reason="internal") == 0
    assert server.metric("requests_failed_total", reason="engine") == 0
