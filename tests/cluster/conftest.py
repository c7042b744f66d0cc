"""A real local Ray with fake GPUs, one for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.cli.local_ray import own_ray
from tests.checkpoints import MODELS, write_checkpoint
from tests.cluster.hosts import ExpertHost
from tests.families import FAMILIES


@pytest.fixture(scope="package")
def ray_session() -> Iterator[None]:
    with own_ray(num_cpus=8, num_gpus=8):
        yield


@pytest.fixture(scope="package")
def hosts(ray_session: None) -> list[ExpertHost]:
    """Four processes that can become any expert replica; starting one for each test would take minutes."""
    return [ExpertHost(f"host-{i}") for i in range(4)]


@pytest.fixture(scope="package")
def granite_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MODELS["granite"], tmp_path_factory.mktemp("granite"))


@pytest.fixture(scope="session")
def mixed_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a layer without experts, and a shared expert in the others."""
    return write_checkpoint(FAMILIES["qwen2_moe"]["qwen2_moe-dense"], tmp_path_factory.mktemp("mixed"))
