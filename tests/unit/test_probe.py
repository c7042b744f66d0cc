"""The probe runs what actors compute with, and what it finds is a profile that a plan can be made of."""

import json
import subprocess
import sys
from typing import Any

import pytest

from actors.probe.stopwatch import undisturbed
from cluster.models.family import spec_at
from cluster.planning.hardware import HardwareProfile, HttpSpeed
from cluster.planning.layout import Layout
from cluster.planning.step_time import StepModel
from cluster.planning.workload import Batch, ServedModel
from deploy.cli.probe import profile_of
from deploy.demo import MODEL_DIR


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """In a process of its own, as the command has it, with little time for each part."""
    command = [sys.executable, "-m", "actors.probe", str(MODEL_DIR), "1", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def profile(found: dict[str, Any]) -> HardwareProfile:
    return profile_of("here", found, HttpSpeed(token_us=100, request_ms=1), None)


def test_what_is_found_is_a_profile(profile: HardwareProfile) -> None:
    assert (profile.device, profile.source, profile.cores) == ("cpu", "measured", 1)
    assert set(profile.lanes) == {"unix", "zmq"}


def test_many_rows_are_bound_by_arithmetic(profile: HardwareProfile) -> None:
    """Weights pass more slowly, and more products are done."""
    for speeds in (profile.linears, profile.experts):
        first, last = speeds[0], speeds[-1]
        assert last.gb_per_second < first.gb_per_second
        assert last.gb_per_second * last.rows > first.gb_per_second * first.rows


def test_a_plan_can_be_made_of_it(profile: HardwareProfile) -> None:
    layout = Layout(1, 2, 1, "unix", profile, profile, is_shared=True)
    steps = StepModel(ServedModel.of(spec_at(MODEL_DIR)), layout)
    assert 0 < steps.step(Batch(1, 16)).total < steps.step(Batch(32, 16)).total


def test_what_else_a_machine_does_is_left_out() -> None:
    """A burst that takes most calls twice as long changes little."""
    assert undisturbed([1.0] * 4 + [2.0] * 6) == 1.0
