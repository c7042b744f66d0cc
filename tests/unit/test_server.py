"""`outcrop serve` ends in order, wherever the signal strikes; tests/e2e/test_lifecycle.py has the real ones."""

from collections.abc import Callable
from typing import NoReturn

import pytest

from cluster.config import ClusterConfig
from deploy import server


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
