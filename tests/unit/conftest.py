"""Fixtures of the tests that need no Ray."""

import pytest
import torch

from tests.unit.fake_supervisor import open_api
from tests.unit.front_cluster import short_waits

__all__ = ["open_api", "short_waits"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
