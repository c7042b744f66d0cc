"""`outcrop serve` ends in order, wherever the signal strikes; tests/e2e/test_lifecycle.py has the real ones."""

import json
import shlex
from collections.abc import Callable
from typing import NoReturn

import pytest

from cluster.config import ClusterConfig
from deploy.cli import server
from deploy.ingress.openai.parsing import parse_body
from deploy.ingress.openai.requests import ChatCompletionRequest, CompletionRequest


def break_off(*_: object) -> NoReturn:
    """As Ray's compiled code does when the handler of a signal raises in it."""
    try:
        raise server._Stopped
    except server._Stopped as stopped:
        raise SystemError("returned a result with an exception set") from stopped


def fail(*_: object) -> NoReturn:
    raise SystemError("something else")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., NoReturn]], None]:
    monkeypatch.setattr(server, "check_everything", lambda _: None)
    monkeypatch.setattr(server, "_check_port", lambda _: None)

    def run(what: Callable[..., NoReturn]) -> None:
        monkeypatch.setattr(server, "_run", what)
        server.serve_model(ClusterConfig(model="m"))

    return run


def test_a_signal_within_ray_is_a_signal(serve: Callable[[Callable[..., NoReturn]], None]) -> None:
    serve(break_off)
    with pytest.raises(SystemError, match="something else"):
        serve(fail)


def test_a_signal_ends_watching_while_the_supervisor_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Supervisor:
        class state:  # noqa: N801 - as a handle has it
            remote = break_off

    monkeypatch.setattr(server.time, "sleep", lambda _: None)
    with pytest.raises(SystemError, match="returned a result"):
        server._watch(Supervisor)


@pytest.mark.parametrize(("is_chat", "key"), [(True, None), (False, None), (False, "secret")])
def test_the_request_that_is_suggested_is_one_that_is_answered(is_chat: bool, key: str | None) -> None:
    config = ClusterConfig(model='it\'s "m"', api_key=key)
    words = shlex.split(server.example(config, "http://127.0.0.1:8000", is_chat).replace("\\\n", ""))
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    assert words[:2] == ["curl", f"http://127.0.0.1:8000{path}"]
    assert ("Authorization: Bearer KEY" in words) == (key is not None)
    body = json.loads(words[-1])
    assert body["model"] == config.model_name
    parse_body(words[-1].encode(), ChatCompletionRequest if is_chat else CompletionRequest)


@pytest.mark.parametrize(
    ("host", "given", "expected"),
    [
        ("127.0.0.1", None, []), ("localhost", None, []), ("::1", None, []), ("127.0.0.1", ["a"], ["a"]),
        ("0.0.0.0", None, None), ("10.0.0.1", None, None), ("a.example", None, None), ("0.0.0.0", ["a"], ["a"]),
    ],
)  # fmt: skip
def test_only_on_loopback_the_names_are_known(host: str, given: list[str] | None, expected: list[str] | None) -> None:
    config = ClusterConfig(model="m", host=host, allowed_hosts=given)
    assert server._with_hosts(config).allowed_hosts == expected
