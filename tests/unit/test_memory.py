"""How large the KV cache becomes, with invented machines and cgroups."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.compute import Compute, told_if_out_of_memory
from actors.engine import memory
from actors.engine.host_memory import available_memory
from actors.engine.memory import GIB, LEAST, SHARE, cpu_budget, gpu_budget, num_kv_blocks
from actors.model.paged_kv import PagedKV
from benchmarks.make_checkpoint import SHAPES
from cluster.config import load_config
from cluster.errors import ModelError
from cluster.messages.actors import EngineOptions
from cluster.models.family import parse_config
from cluster.models.spec import ModelSpec
from cluster.policy.blueprint import draw_blueprint
from cluster.policy.resources import Machine
from tests.specs import PLAIN, PLAIN_BFLOAT16, described

MEMINFO = "MemTotal:       24000000 kB\nMemFree:        1000000 kB\nMemAvailable:   {} kB\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def machine(root: Path, available: int, cgroup: str = "") -> Path:
    return write(root, {"proc/meminfo": MEMINFO.format(available // 1024), "proc/self/cgroup": cgroup})


def group(path: str, limit: str, usage: int, inactive: int = 0) -> dict[str, str]:
    stat = f"anon 1\nfile 5\ninactive_file {inactive}\n"
    return {f"{path}/memory.max": f"{limit}\n", f"{path}/memory.current": f"{usage}\n", f"{path}/memory.stat": stat}


def group_v1(path: str, limit: int, usage: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"{path}/memory.limit_in_bytes": f"{limit}\n",
        f"{path}/memory.usage_in_bytes": f"{usage}\n",
        f"{path}/memory.stat": f"inactive_file 7\ntotal_inactive_file {inactive}\n",
    }


def test_without_cgroups_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path, 20 * GIB)) == 20 * GIB


def test_nobody_tells(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


def test_the_tightest_cgroup_counts_its_droppable_cache_does_not(tmp_path: Path) -> None:
    root = machine(tmp_path, 20 * GIB, "0::/pod/box\n")
    write(root, group("sys/fs/cgroup/pod/box", "max", 6 * GIB))
    write(root, group("sys/fs/cgroup/pod", str(8 * GIB), 6 * GIB, inactive=GIB))
    assert available_memory(root) == 3 * GIB


def test_a_container_sees_its_own_group_as_the_top(tmp_path: Path) -> None:
    root = machine(tmp_path, 20 * GIB, "0::/\n")
    write(root, group("sys/fs/cgroup", str(4 * GIB), 3 * GIB))
    assert available_memory(root) == GIB


def test_cgroups_of_version_1(tmp_path: Path) -> None:
    """In a container the path is the host's, and does not exist; without a limit it is a huge number."""
    root = machine(tmp_path, 20 * GIB, "9:cpu,cpuacct:/docker/ab\n8:memory:/docker/ab\n")
    write(root, group_v1("sys/fs/cgroup/memory", 8 * GIB, 5 * GIB, inactive=GIB))
    write(root, {"sys/fs/cgroup/docker/ab/memory.max": "0\n"})
    assert available_memory(root) == 4 * GIB
    write(root, group_v1("sys/fs/cgroup/memory", 2**63 - 4096, 5 * GIB))
    assert available_memory(root) == 20 * GIB


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    root = machine(tmp_path, 20 * GIB, "0::/\n")
    assert available_memory(write(root, group("sys/fs/cgroup", str(GIB), 2 * GIB))) == 0


@pytest.mark.parametrize(
    ("available", "others", "expected"),
    [
        (20 * GIB, (), 10 * GIB),
        (20 * GIB, (0,), 5 * GIB),
        (20 * GIB, (10 * GIB,), 5 * GIB),  # it may not have written to any of it yet
        (GIB, (), LEAST),
        (GIB, (20 * GIB,), LEAST),
        (GIB // 4, (), GIB // 4),
        (None, (), LEAST),
    ],
)
def test_fronts_share_what_is_free(available: int | None, others: tuple[int, ...], expected: int) -> None:
    assert cpu_budget(available, others) == expected


@given(st.integers(8 * GIB, 1000 * GIB), st.integers(1, 3), st.integers(0, 3))
def test_all_fronts_of_a_host_together_keep_to_what_is_free(available: int, together: int, later: int) -> None:
    sizes = [cpu_budget(available, (0,) * (together - 1))] * together
    for _ in range(later):  # what was promised to the others still looks free
        sizes.append(cpu_budget(available, sizes))
    assert sum(sizes) <= max(available, 0.5 * GIB * len(sizes))
    assert sizes[0] >= SHARE * available // together


def options(**settings: object) -> tuple[ModelSpec, EngineOptions]:
    model = parse_config(SHAPES["1b-a400m"])
    config = load_config({"model": "m", "device": "cpu", "lane": "local", **settings}, environ={})
    return model, draw_blueprint(config, described(model), "m", Machine(2, 0, 2)).engine


def test_never_more_than_all_sequences_could_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000 * GIB)
    model, engine = options(max_num_seqs=3, max_model_len=100)
    assert num_kv_blocks(engine, model, PLAIN) == 3 * 7


def test_the_default_follows_memory_and_holds_one_sequence_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = options()
    one = 4096 // engine.block_size
    block = PagedKV.bytes_per_block(model, engine.block_size, torch.bfloat16)
    for available, expected in ((4000 * block, 2000), (100 * block, one), (0, one)):
        monkeypatch.setattr(memory, "available_memory", lambda available=available: available)
        assert num_kv_blocks(engine, model, PLAIN_BFLOAT16) == expected


def test_a_setting_is_kept_and_refused_if_too_small() -> None:
    model, engine = options(kv_cache_gib=1)
    block = PagedKV.bytes_per_block(model, engine.block_size, torch.bfloat16)
    assert num_kv_blocks(engine, model, PLAIN_BFLOAT16) == GIB // block
    model, engine = options(kv_cache_gib=0.1)
    with pytest.raises(ModelError, match=r"kv_cache_gib=0\.1 holds 2176 tokens, fewer than max_model_len=4096"):
        num_kv_blocks(engine, model, PLAIN_BFLOAT16)


@pytest.mark.parametrize(
    ("free", "reserved", "share", "expected"),
    [
        (70, 10, 1.0, 0.9 * 80 - 10 - 0.5),
        (20, 10, 1.0, 20),  # others have the rest already
        (70, 10, 0.5, 0.9 * 40 - 10 - 0.5),  # two fronts to a GPU: what the other has not taken yet is not ours
        (70, 40, 0.5, 0.9 * 40 - 40 - 0.5),  # the weights alone are too much
        (70, 10, 2.0, 0.9 * 80 - 10 - 0.5),
    ],
)
def test_a_front_keeps_to_its_share_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, free: float, reserved: float, share: float, expected: float
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * GIB), 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int(reserved * GIB))
    assert gpu_budget(0.9, share) == pytest.approx(expected * GIB, abs=1)
    model, engine = options()
    on_gpu = Compute(torch.device("cuda"), torch.bfloat16)
    if expected < 0:
        found = r"kv_cache_gib=-4\.5 holds 0 tokens.*raise gpu_memory_utilization or gpus_per_front"
        with pytest.raises(ModelError, match=found):
            num_kv_blocks(engine, model, on_gpu, (), share)
        return
    block = PagedKV.bytes_per_block(model, engine.block_size, torch.bfloat16)
    most = 64 * 4096 // engine.block_size
    assert num_kv_blocks(engine, model, on_gpu, (), share) == min(most, int(expected * GIB) // block)


def test_a_gpu_without_room_is_told_with_the_way_out() -> None:
    found = r"the KV cache does not fit into the GPU's memory: set kv_cache_gib \(no room\)"
    with pytest.raises(ModelError, match=found), told_if_out_of_memory("the KV cache", "set kv_cache_gib"):
        raise torch.OutOfMemoryError("no room\nat all")
