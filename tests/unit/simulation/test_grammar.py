"""What is to go wrong, traffic of a file, and policies to compare: read, or refused with the place."""

from pathlib import Path

import pytest

from actors.simulation.failures import Failure, parse_failures
from actors.simulation.traffic import Arrival, poisson, read_trace
from cluster.errors import ConfigError


def test_failures_are_read_and_come_in_the_order_of_time() -> None:
    text = "node at 1200 s; kill 3 replicas at 600 s;hot expert from 1800.5s; kill 1 front at 5 s;"
    assert parse_failures(text) == (
        Failure(5, "fronts", 1),
        Failure(600, "replicas", 3),
        Failure(1200, "node"),
        Failure(1800.5, "hot expert"),
    )
    assert parse_failures(" ") == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kill 3 replicas", r"fail='kill 3 replicas', at character 1, is no failure: write kill N replicas at T s"),
        ("node at 5 s; nod at 7 s", r"fail='nod at 7 s', at character 14,"),
        ("node at 5 s;; node at 7 s", r"fail='', at character 13,"),
        ("kill -1 replicas at 5 s", r"at character 1,"),
        ("  kill 0 fronts at 5 s", r"at character 3: choose a number of 1 or more"),
    ],
)
def test_what_is_no_failure_is_named_with_its_place(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_failures(text)


def test_random_traffic_is_the_same_for_a_seed_and_has_its_rate() -> None:
    first = list(poisson(5.0, 1000.0, 100, 20, seed=1))
    assert first == list(poisson(5.0, 1000.0, 100, 20, seed=1)) != list(poisson(5.0, 1000.0, 100, 20, seed=2))
    assert 4500 < len(first) < 5500
    assert all(50 <= each.input_len <= 150 and 10 <= each.output_len <= 30 for each in first)


def test_a_trace_is_read_up_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text('{"at": 0.5, "input_len": 7, "output_len": 2}\n{"at": 99, "input_len": 7, "output_len": 2}\n')
    assert list(read_trace(path, 60.0)) == [Arrival(0.5, 7, 2)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: .*write"), ('{"at": 1}', "line 2: KeyError"), ("[]", "line 2: TypeError"),
        ('{"at": 0.1, "input_len": 7, "output_len": 2}', "line 2: at=0.1 is before the line above"),
        ('{"at": 1, "input_len": 0, "output_len": 2}', "line 2: at must be 0 or more, and lengths 1 or more"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "trace"
    path.write_text('{"at": 0.5, "input_len": 7, "output_len": 2}\n' + line + "\n")
    with pytest.raises(ConfigError, match=told):
        list(read_trace(path, 60.0))
    with pytest.raises(ConfigError, match="can't be read"):
        list(read_trace(tmp_path / "nothing", 60.0))
