"""A real local Ray with fake GPUs, one for all tests of this folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from deploy.local_ray import descendants, end_processes
from tests.checkpoints import MODELS, write_checkpoint
from tests.cluster.hosts import ExpertHost


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    temp_dir = tempfile.mkdtemp(prefix="oc-", dir="/tmp")
    ray.init(
        "local",
        num_cpus=8,
        num_gpus=8,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _temp_dir=temp_dir,
        log_to_driver=False,
    )
    yield
    family = descendants(os.getpid())
    ray.shutdown()
    end_processes(family)
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture(scope="session")
def hosts(ray_session: None) -> list[ExpertHost]:
    """Four processes that can become any expert replica; starting one for each test would take minutes."""
    return [ExpertHost(f"host-{i}") for i in range(4)]


@pytest.fixture(scope="session")
def granite_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MODELS["granite"], tmp_path_factory.mktemp("granite"))
