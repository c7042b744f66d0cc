"""Whatever comes in: an answer that names what is wrong, no 5xx, no trace in the log, and a server that serves on."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest

from tests.e2e.servers import Server, eventually
from tests.malformed import CHAT, COMPLETIONS, DETOKENIZE, MALFORMED, TOKENIZE

GOOD = {"prompt": "Hi", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
JSON = {"Content-Type": "application/json"}
MIB = 2**20
MAX_BODY_MIB = 8


class StatusLog(list[int]):
    """The status of every answer in this file."""

    def __call__(self, response: httpx.Response) -> None:
        self.append(response.status_code)


@pytest.fixture(scope="module")
def statuses() -> StatusLog:
    return StatusLog()


@pytest.fixture(scope="module")
def http(server: Server, statuses: StatusLog) -> Iterator[httpx.Client]:
    """One connection for all: an answer must leave it usable."""
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
    with httpx.Client(
        base_url=server.url, limits=limits, timeout=60, trust_env=False, event_hooks={"response": [statuses]}
    ) as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer; checks OpenAI's shape."""
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    assert content.keys() == {"error"}
    error = content["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    return error  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"), [row[1:] for row in MALFORMED], ids=[r[0] for r in MALFORMED]
)
def test_malformed_bodies(http: httpx.Client, path: str, body: bytes, status: int, param: str | None) -> None:
    response = http.post(path, content=body, headers=JSON)
    assert response.status_code == status
    assert error_of(response)["param"] == param


@pytest.mark.parametrize("is_chat", [False, True])
def test_too_long_prompts_say_so_in_openais_words(http: httpx.Client, is_chat: bool) -> None:
    text = "word " * 1000
    body = {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text}
    error = error_of(http.post(CHAT if is_chat else COMPLETIONS, json=body))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages" if is_chat else "prompt")
    assert "maximum context length is 2048 tokens" in error["message"]


@pytest.mark.parametrize("framing", [f"Content-Length: {50 * MIB}", "Transfer-Encoding: chunked"])
def test_50_mib_bodies_are_not_read(server: Server, framing: str) -> None:
    """The answer comes while most of the body is still here; the server may then read on or hang up."""
    is_chunked = "chunked" in framing
    head = POST + framing.encode() + b"\r\n\r\n" + (b"%x\r\n" % (50 * MIB) if is_chunked else b"")
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head + bytes(MAX_BODY_MIB * MIB + 1 if is_chunked else 1))
        answer = HTTPResponse(connection)
        answer.begin()
        response = httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())
        with suppress(ConnectionError):
            connection.sendall(bytes(40 * MIB))
    assert response.status_code == 413
    assert f"larger than {MAX_BODY_MIB} MiB" in error_of(response)["message"]


def test_a_body_just_below_the_limit_is_read(http: httpx.Client) -> None:
    body = json.dumps(GOOD).encode()
    assert http.post(COMPLETIONS, content=body.ljust(MAX_BODY_MIB * MIB), headers=JSON).status_code == 200
    assert http.post(COMPLETIONS, content=body.ljust(MAX_BODY_MIB * MIB + 1), headers=JSON).status_code == 413


@pytest.mark.parametrize(
    ("path", "body"), [(COMPLETIONS, b'{"prompt": "Hi"}'), ("/v1/cluster/scale", b'{"group": "all", "replicas": 2}')]
)
def test_web_pages_of_others_get_nothing(http: httpx.Client, server: Server, path: str, body: bytes) -> None:
    evil, name = {"Origin": "http://evil.example"}, {"Host": f"evil.example:{server.port}"}
    for headers in (evil, evil | JSON):  # what a page can send without asking first, and what it can't
        assert http.post(path, content=body, headers=headers).status_code == 403
    rebound = {"Origin": f"http://evil.example:{server.port}"} | name | JSON
    assert http.post(path, content=body, headers=rebound).status_code == 421
    assert http.get("/v1/models", headers=name).status_code == 421
    assert http.post(path, content=body).status_code == 415
    assert server.get("/v1/cluster").json()["wanted"] == {"fronts": 1, "replicas": [1, 1]}


def test_our_own_page_may(http: httpx.Client, server: Server) -> None:
    for host in (f"127.0.0.1:{server.port}", f"localhost:{server.port}"):
        headers = {"Host": host, "Origin": f"http://{host}"} | JSON
        assert http.post(COMPLETIONS, content=json.dumps(GOOD).encode(), headers=headers).status_code == 200


NUM_BODIES = 3


def test_streams_go_on_while_millions_of_token_ids_come(http: httpx.Client, server: Server) -> None:
    ids = b'{"tokens": [' + b"7," * 2_500_000 + b"7]}"
    body = GOOD | {"max_tokens": 2000, "stream": True}
    sent, gaps = threading.Event(), list[float]()

    def send() -> None:
        for _ in range(NUM_BODIES):
            http.post("/detokenize", content=ids, headers=JSON)
        sent.set()

    with httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=60, trust_env=False) as stream:
        lines = stream.iter_lines()
        next(lines)
        sender = threading.Thread(target=send)
        sender.start()
        started = time.monotonic()
        while not sent.is_set():
            asked = time.monotonic()
            next(lines)
            gaps.append(time.monotonic() - asked)
        sender.join()
        took = time.monotonic() - started
    # An event loop that reads a body at one stretch lets the stream wait for most of the time that a body takes, with
    # each of them. Once or twice a busy machine does, too.
    assert sorted(gaps)[-NUM_BODIES] < took / NUM_BODIES / 2


@pytest.mark.parametrize(
    ("headers", "content"),
    [
        (
            {"Content-Type": "multipart/form-data; boundary=x"},
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb',
        ),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"prompt=Hi&max_tokens=3"),
        ({"Content-Type": "application/octet-stream"}, bytes(range(256))),
        ({"Content-Type": "application/xml"}, b"<prompt>Hi</prompt>"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, b"\x1f\x8b\x08\x00garbage"),
        ({"Content-Type": "nonsense \xff".encode("latin-1")}, b"\xff"),
    ],
    ids=["multipart", "form", "binary", "xml", "gzip", "nonsense"],
)
def test_other_content_is_no_json(http: httpx.Client, headers: Any, content: bytes) -> None:
    response = http.post(COMPLETIONS, content=content, headers=headers)
    assert response.status_code in (400, 415)
    error_of(response)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE])
def test_wrong_methods(http: httpx.Client, method: str, path: str) -> None:
    response = http.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert method == "HEAD" or error_of(response)["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", ["//v1/completions", "/v1/completions/../nothing", "/v1/%00", "/" + "a" * 50_000])
def test_odd_paths(http: httpx.Client, path: str) -> None:
    response = http.post(path, json=GOOD)
    assert response.status_code == 404
    error_of(response)


def test_a_websocket_is_refused(http: httpx.Client) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    assert http.get(COMPLETIONS, headers=upgrade | key).status_code in (400, 403, 404, 405)


GARBAGE = {
    "binary": bytes(range(256)) * 8,
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(50),
    "unknown version": b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
    "pipelined": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n\x00\xff garbage\r\n\r\n",
    "length is no number": POST + b"Content-Length: abc\r\n\r\n{}",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "length and chunks": POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    "bad chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
    "header without colon": b"GET /health HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_on_the_port_is_answered_with_400_or_hung_up_on(server: Server, name: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(GARBAGE[name])
        answer = connection.makefile("rb").read()
    assert not answer or b"HTTP/1.1 400" in answer


ABANDONED = {
    "before the head is complete": POST[:40],
    "before the body": POST + b"Content-Length: 1000\r\n\r\n",
    "in the body": POST + b'Content-Length: 1000\r\n\r\n{"prompt": "Hi"',
    "in a chunk": POST + b'Transfer-Encoding: chunked\r\n\r\n20\r\n{"prompt": "Hi"',
    "before the answer": POST + b"Content-Length: 34\r\n\r\n" + b'{"prompt": "Hi", "max_tokens": 99}',
}


@pytest.mark.parametrize("when", ABANDONED)
def test_hanging_up(server: Server, when: str) -> None:
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
    for connection in connections:
        connection.sendall(ABANDONED[when])
    for connection in connections:
        connection.close()
    eventually(server.is_answering, "the server answers")


def test_afterwards_the_server_is_as_before(http: httpx.Client, server: Server, statuses: StatusLog) -> None:
    server.wait_idle()
    response = http.post(COMPLETIONS, json=GOOD)
    assert (response.status_code, response.json()["usage"]["completion_tokens"]) == (200, 3)
    assert http.get("/health").json()["state"] == "ready"
    assert [status for status in statuses if status >= 500] == []
    assert server.metric("requests_failed_total", reason="engine") == 0
    _, found, trace = server.ray_logs().partition("Traceback")
    assert not found, trace[:5000]
