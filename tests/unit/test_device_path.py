"""What a GPU would be asked to do, without one: copies through staging, how often the host waits, and that nothing
between two waits depends on a value.
"""

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actors.compute import Compute
from actors.dispatch.dispatcher import NoExperts
from actors.dispatch.local import LocalDispatcher
from actors.dispatch.remote import RemoteDispatcher
from actors.engine.engine import Engine
from actors.engine.kv_cache import BlockAllocator
from actors.engine.scheduler import Scheduler
from actors.experts import layer_experts
from actors.experts.loading import load_experts
from actors.experts.store import ExpertStore
from actors.lanes import wire
from actors.model.front_layers import TorchLayers
from actors.model.loading import load_front
from actors.model.paged_kv import PagedKV
from actors.replica.replica import Replica
from actors.staging import Pinned, Staging
from actors.weights import Weights
from benchmarks.gpu_check.models import InProcess
from cluster.expert_map import ExpertMap, ReplicaAddress, contiguous_homes
from cluster.messages.actors import ReplicaSpec
from cluster.messages.requests import SamplingParams
from cluster.metrics import Metrics
from cluster.models.checkpoint import Checkpoint
from tests.checkpoints import MODELS, write_checkpoint
from tests.engines import make_engine, run
from tests.specs import CPU, PLAIN

PROMPTS = [[(11 * i + 5 * j) % 250 for i in range(length)] for j, length in enumerate((6, 19, 1))]
PARAMS = [
    SamplingParams(max_tokens=12, temperature=0.0, prompt_logprobs=2),
    SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=5, logprobs=3),
    SamplingParams(max_tokens=12, temperature=1.0, top_k=5, seed=6, return_routed_experts=True),
]
REQUESTS = {str(i): pair for i, pair in enumerate(zip(PROMPTS, PARAMS, strict=True))}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(MODELS["granite"], tmp_path_factory.mktemp("granite")))


class Counting(Pinned):
    """The staging of a GPU, on CPU tensors; counts what is downloaded."""

    def __init__(self, device: torch.device = CPU) -> None:
        super().__init__(device)
        self.num_downloads = 0

    def download(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.num_downloads += 1
        return super().download(*tensors)


class ToMeta(Staging):
    """A device that holds no values: whatever depends on one raises. Downloads are zeros."""

    def __init__(self) -> None:
        self.num_downloads = 0

    def upload(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.to("meta") for tensor in tensors)

    def download(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.num_downloads += 1
        return tuple(torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in tensors)


def replicas_of(checkpoint: Checkpoint, expert_map: ExpertMap, staging: Any) -> dict[str, Replica]:
    found = {}
    for address in expert_map.replicas:
        held = expert_map.experts_of(address.group)
        spec = ReplicaSpec(address.replica_id, address.group, "", "cpu", "float32", held, 1)
        store = load_experts(Weights(checkpoint, PLAIN), held)
        store = ExpertStore(store.spec, tuple(store.layers), PLAIN, staging())
        found[address.replica_id] = Replica(spec, store, lambda layer, ids: pytest.fail("nothing moves"), Metrics())
    return found


def two_groups(checkpoint: Checkpoint) -> ExpertMap:
    homes = contiguous_homes(checkpoint.spec.num_layers, checkpoint.spec.num_experts, 2)
    addresses = tuple(ReplicaAddress(f"expert-g{group}-r0", group, ()) for group in range(2))
    return ExpertMap(0, 2, homes).with_replicas(addresses)


def engine_of(checkpoint: Checkpoint, staging: Staging, replica_staging: Any = Counting) -> tuple[Engine, Any]:
    spec, expert_map = checkpoint.spec, two_groups(checkpoint)
    replicas = replicas_of(checkpoint, expert_map, replica_staging)
    dispatcher = RemoteDispatcher(InProcess(replicas), Metrics(), staging=staging)
    dispatcher.set_map(expert_map)
    front = load_front(Weights(checkpoint, PLAIN), staging)
    scheduler = Scheduler(
        BlockAllocator(64, 4, True), max_num_batched_tokens=16, max_num_seqs=8, max_model_len=spec.max_context
    )
    return Engine(front, PagedKV(spec, 64, 4, PLAIN), dispatcher, scheduler, Metrics()), replicas


def test_tokens_scores_and_routing_through_staging_are_those_of_the_oracle(checkpoint: Checkpoint) -> None:
    engine, _ = engine_of(checkpoint, Counting())
    results, expected = run(engine, REQUESTS), run(make_engine(checkpoint.directory), REQUESTS)
    for name, result in results.items():
        assert result.token_ids == expected[name].token_ids
        for ours, theirs in zip(result.outputs, expected[name].outputs, strict=True):
            assert ours.routed_experts == theirs.routed_experts
            assert [s.token_id for s in ours.logprobs] == [s.token_id for s in theirs.logprobs]
            for mine, oracle in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert mine.logprob == pytest.approx(oracle.logprob, abs=1e-4)


@contextmanager
def host_reads() -> Any:
    """Counts operations through which the host reads a value of a tensor, by name: each would wait for a GPU."""
    reading = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select", "unique")

    class Mode(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name.startswith(reading):
                self.seen[name] += 1
            return func(*args, **kwargs or {})

    with Mode() as mode:
        yield mode.seen


def test_a_front_waits_once_a_layer_and_twice_a_step(checkpoint: Checkpoint) -> None:
    staging = Counting()
    engine, replicas = engine_of(checkpoint, staging)
    seen: list[int] = []
    forward = engine.model.forward

    def counted(*given: Any) -> Any:
        before = staging.num_downloads
        result = forward(*given)
        seen.append(staging.num_downloads - before)
        return result

    engine.model.forward = counted  # type: ignore[method-assign]
    run(engine, {"0": (PROMPTS[1], SamplingParams(max_tokens=8, temperature=0.0))})
    assert set(seen) == {checkpoint.spec.num_layers}
    assert staging.num_downloads == len(seen) * (checkpoint.spec.num_layers + 1), "and once for expert counts"
    for replica in replicas.values():
        calls = replica.metrics.samples()
        num_messages = next(v for name, _, v in calls if name == "outcrop_expert_compute_seconds_count")
        assert replica.store.staging.num_downloads == num_messages


def test_between_its_waits_a_front_depends_on_no_value(checkpoint: Checkpoint) -> None:
    """On meta tensors a read raises."""
    staging, spec = ToMeta(), checkpoint.spec
    on_meta = Compute(torch.device("meta"), torch.bfloat16)
    front = load_front(Weights(checkpoint, on_meta), staging)
    kv = PagedKV(spec, 8, 16, on_meta)
    scheduler = Scheduler(BlockAllocator(8, 16, True), max_num_batched_tokens=16, max_num_seqs=8, max_model_len=64)
    engine = Engine(front, kv, NoExperts(), scheduler, Metrics())
    for length in (1, 16):
        engine._self_test.compute(length, 0, NoExperts())
    everywhere = load_experts(Weights(checkpoint, on_meta), checkpoint.all_experts)
    engine._self_test.compute(16, 0, LocalDispatcher(everywhere))


@pytest.mark.parametrize("has_kernel", [True, False])
def test_between_its_waits_a_replica_depends_on_no_value_on_its_device(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, has_kernel: bool
) -> None:
    """Nor where grouped_mm has no kernel, as on an A100: the host knows the ends that the loop needs."""
    monkeypatch.setattr(layer_experts, "can_group", lambda device, dtype: has_kernel)
    staging, spec = ToMeta(), checkpoint.spec
    on_meta = Compute(torch.device("meta"), torch.bfloat16)
    loaded = load_experts(Weights(checkpoint, on_meta), checkpoint.all_experts)
    store = ExpertStore(spec, tuple(loaded.layers), on_meta, staging)
    replica = Replica(
        ReplicaSpec("expert-g0-r0", 0, "", "cpu", "float32", checkpoint.all_experts, 1),
        store,
        lambda layer, ids: pytest.fail("nothing moves"),
        Metrics(),
    )
    x, gates = torch.ones(5, spec.hidden_size).bfloat16(), torch.ones(5, spec.top_k).bfloat16()
    ids = torch.tensor([[0, 1], [2, -1], [7, 3], [-1, 5], [6, 6]])
    answer = wire.unpack_partial(replica.answer(wire.pack_dispatch(2, x, gates, ids)))
    assert answer.partial_TD is not None
    assert answer.partial_TD.shape == x.shape
    assert staging.num_downloads == 1


def test_a_front_with_all_experts_waits_once_a_layer_where_grouped_products_have_no_kernel(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = Counting()
    loaded = load_experts(Weights(checkpoint, PLAIN), checkpoint.all_experts)
    store = ExpertStore(checkpoint.spec, tuple(loaded.layers), PLAIN, staging)
    x, gates = torch.randn(4, checkpoint.spec.hidden_size), torch.rand(4, 2)
    ids = torch.tensor([[0, 7], [6, 5], [2, 4], [7, 1]])
    expected = store.run(1, x, ids, gates)
    monkeypatch.setattr(layer_experts, "can_group", lambda device, dtype: False)
    monkeypatch.setattr(layer_experts, "is_on_host", lambda tensor: False)
    actual = layer_experts.combine_sorted(store.layers[1], x, layer_experts.Choices(ids, gates, staging), F.silu)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert staging.num_downloads == 1


@pytest.mark.parametrize(("capability", "can"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), False)])
def test_grouped_products_are_for_gpus_that_have_a_kernel(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], can: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    can_group = layer_experts.can_group.__wrapped__
    assert can_group(torch.device("cuda"), torch.bfloat16) == can
    assert not can_group(torch.device("cuda"), torch.float32)
    assert can_group(torch.device("cpu"), torch.float32)


@contextmanager
def launches() -> Any:
    """Counts operations on meta tensors that a GPU would launch a kernel or a copy for: not views and allocations."""

    class Mode(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result, name = func(*args, **kwargs or {}), func.overloadpacket.__name__
            written = memory(result) if name.endswith("_") else memory(result) - memory(args)
            if written and not name.startswith(("empty", "new_empty")):
                self.seen[name] += 1
            return result

    def memory(values: Any) -> set[int]:
        return {t.untyped_storage()._cdata for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_meta}

    with Mode() as mode:
        yield mode.seen


ON_META = Compute(torch.device("meta"), torch.bfloat16, "flash")


def test_a_layer_of_a_front_launches_no_more_than_it_did(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch takes a CPU about as long as a GPU takes for a small product: a decode step is as slow as they are many.
    Attention counts as one.
    """
    staging, seen, attend_and_route = ToMeta(), list[Any](), TorchLayers.attend_and_route
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, *_, **__: torch.zeros_like(q))

    def counted(*given: Any) -> Any:
        with launches() as mine:
            seen.append(mine)
            return attend_and_route(*given)

    monkeypatch.setattr(TorchLayers, "attend_and_route", counted)
    front, kv = load_front(Weights(checkpoint, ON_META), staging), PagedKV(checkpoint.spec, 8, 256, ON_META)
    scheduler = Scheduler(BlockAllocator(8, 256, True), max_num_batched_tokens=16, max_num_seqs=8, max_model_len=64)
    Engine(front, kv, NoExperts(), scheduler, Metrics())._self_test.compute(1, 0, NoExperts())
    assert len(seen) == checkpoint.spec.num_layers
    assert max(mine.total() for mine in seen) <= 23, seen


@pytest.mark.parametrize(("has_kernel", "most"), [(True, 17), (False, 22)])
def test_a_message_to_a_replica_launches_no_more_than_it_did(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, has_kernel: bool, most: int
) -> None:
    monkeypatch.setattr(layer_experts, "can_group", lambda device, dtype: has_kernel)
    loaded = load_experts(Weights(checkpoint, ON_META), checkpoint.all_experts)
    store = ExpertStore(checkpoint.spec, tuple(loaded.layers), ON_META, ToMeta())
    x, gates = torch.ones(1, checkpoint.spec.hidden_size).bfloat16(), torch.ones(1, 2).bfloat16()
    with launches() as seen:
        store.run(1, x, torch.tensor([[1, 6]]), gates)
    assert 0 < seen.total() <= most, seen


def test_experts_that_are_elsewhere_are_masked_on_a_gpu(checkpoint: Checkpoint) -> None:
    """There nothing is cut off, as to know how much is to wait: rows behind the last expert's may hold anything."""
    held = tuple(ids[:5] for ids in checkpoint.all_experts)
    store = load_experts(Weights(checkpoint, PLAIN), held)
    ids = torch.tensor([[0, 7], [6, 5], [2, 4], [7, 1]])
    ids = ids.where(ids < 5, -1)
    x, gates = torch.randn(4, checkpoint.spec.hidden_size), torch.rand(4, 2)
    expected = store.run(1, x, ids, gates)

    experts = store.layers[1]
    run_ = type(experts).run

    def with_garbage(self: Any, x_PD: Tensor, ends_E: Tensor, activation: Any) -> Tensor:
        y_PD = run_(self, x_PD, ends_E, activation)
        y_PD[int(ends_E[-1]) :] = float("nan")
        return y_PD

    rows = store._rows[1][ids]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(experts), "run", with_garbage)
        patch.setattr(layer_experts, "is_on_host", lambda tensor: False)
        actual = experts.combine(x, layer_experts.Choices(rows, gates), store.activation)
    torch.testing.assert_close(actual, expected)


def test_a_sampler_reads_once_for_all_rows() -> None:
    from actors.engine.sampler import sample
    from tests.unit.test_sampler import sequence

    logits = torch.randn(8, 2000)
    rules = [{"temperature": 0.7, "top_p": 0.2, "seed": row} for row in range(8)]
    sequences = [sequence((0,), (2,) * row, **each) for row, each in enumerate(rules)]
    with host_reads() as seen:
        sample(logits, sequences)
    assert not seen


def test_a_part_that_is_sent_anew_stays_on_the_host(checkpoint: Checkpoint) -> None:
    """What comes of it is added up there, and uploaded once, as any part."""
    spec, old = checkpoint.spec, two_groups(checkpoint)
    homes = contiguous_homes(spec.num_layers, spec.num_experts, 4)
    addresses = tuple(ReplicaAddress(f"expert-g{group}-r1", group, ()) for group in range(4))
    new = ExpertMap(old.version, 4, homes).with_replicas(addresses)
    replicas = replicas_of(checkpoint, new, Counting)
    refusing = SimpleNamespace(answer=lambda message: wire.pack_refusal(wire.NOT_HELD, "moved", 0))
    staging = Counting()
    lane = InProcess(replicas | {address.replica_id: refusing for address in old.replicas})
    dispatcher = RemoteDispatcher(lane, Metrics(), staging=staging)
    dispatcher.set_map(old)
    x = torch.randn(6, spec.hidden_size)
    ids = torch.stack([torch.randperm(spec.num_experts)[: spec.top_k] for _ in range(6)])
    gates = torch.rand(6, spec.top_k)
    pending = dispatcher.dispatch(1, x, ids, gates)
    dispatcher.set_map(new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "download", lambda *_: pytest.fail("a part that is here is downloaded"))
        actual = dispatcher.combine(pending)
    expected = load_experts(Weights(checkpoint, PLAIN), checkpoint.all_experts).run(1, x, ids, gates)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
