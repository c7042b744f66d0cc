"""The sixteen predictions that are held against measurements: each is made, and errors are told as they are."""

from pathlib import Path

import pytest

from benchmarks import plan_error
from benchmarks.make_checkpoint import SHAPES
from cluster.models.family import parse_config
from cluster.planning.workload import ServedModel
from tests.unit.planning_profiles import profile

MODEL = ServedModel.of(parse_config(SHAPES["1b-a400m"]))


def test_sixteen_cases_are_predicted() -> None:
    cases = plan_error.cases(MODEL, profile())
    predicted = {case.name: case.predict() for case in cases}
    assert len(predicted) == 16
    assert all(value > 0 for value in predicted.values())
    assert predicted["decode 32, 2 x 1"] > predicted["decode 8, 2 x 1"] > predicted["decode 1, 2 x 1"]
    assert predicted["death of a replica: longest step"] > predicted["decode 8, 2 x 2"]
    assert predicted["HTTP, 32 streams"] > predicted["HTTP, 8 streams"]


def test_errors_are_shares_of_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    cases = plan_error.cases(MODEL, profile())
    measured = {case.name: case.predict() * (2.0 if number == 0 else 1.0) for number, case in enumerate(cases)}
    figures = plan_error.compare(cases, measured)
    assert figures[0].error == pytest.approx(-0.5)
    plan_error.show(figures)
    assert "median error 0 % (aim 10 %), worst 50 % (aim 25 %)" in capsys.readouterr().out


def test_what_a_run_measured_names_every_case(tmp_path: Path) -> None:
    """A file of --out is read by --measured."""
    cases = plan_error.cases(MODEL, profile())
    measured = {case.name: 1.0 for case in cases}
    file = tmp_path / "plan-error.json"
    file.write_text(plan_error.as_json("box", plan_error.compare(cases, measured)))
    assert plan_error.read_measured(file) == measured
