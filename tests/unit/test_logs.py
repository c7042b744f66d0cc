"""One line per event, as text or as JSON."""

import json
import logging

import pytest

from cluster.logs import set_up_logs


@pytest.fixture(autouse=True)
def _as_before() -> object:
    loggers = [logging.getLogger(name) for name in ("cluster", "actors", "deploy")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_json_has_a_key_for_everything_that_belongs_to_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("front-0", "json")
    logging.getLogger("deploy.ingress.generation").info(
        "request %s", "finished", extra={"request_id": "r1", "tokens": 3}
    )
    line = json.loads(capsys.readouterr().err)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "process": "front-0",
        "logger": "deploy.ingress.generation",
        "message": "request finished",
        "request_id": "r1",
        "tokens": 3,
    }


def test_an_exception_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("supervisor", "json")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("cluster.control.supervisor").exception("watching goes on")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: broken" in json.loads(line)["exception"]


def test_text_is_for_people_and_levels_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("ingress", "text", "warning")
    logging.getLogger("deploy.ingress.api").info("not shown")
    logging.getLogger("deploy.ingress.api").warning("shown", extra={"request_id": "r1"})
    logging.getLogger("somebody.else").warning("not ours")
    shown = capsys.readouterr().err
    assert shown.endswith("WARNING ingress: shown request_id=r1\n")
    assert "not shown" not in shown
