"""What a replica says of dispatches that it can't compute: to the front, and in its log."""

import logging
from types import SimpleNamespace

import pytest
import torch

from actors.experts.layer_experts import LayerExperts
from actors.experts.store import ExpertStore
from actors.lanes import wire
from actors.lanes.step_id import StepId
from actors.replica.actor import ExpertActor
from actors.replica.replica import Replica
from cluster.messages.actors import ReplicaSpec
from cluster.metrics import Metrics
from tests.specs import PLAIN, spec_of

HIDDEN, WIDTH = 4, 2
SPEC = spec_of(
    {
        "vocab_size": 10,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
)


@pytest.fixture
def replica() -> Replica:
    """Holds expert 0 of both layers."""
    experts = LayerExperts((0,), torch.ones(1, 2 * WIDTH, HIDDEN), torch.ones(1, HIDDEN, WIDTH))
    spec = ReplicaSpec("expert-g0-r0", 0, "", "cpu", "float32", ((0,), (0,)), 1)
    return Replica(spec, ExpertStore(SPEC, (experts, experts), PLAIN), lambda layer, ids: experts, Metrics())


def dispatch(number: int, layer: int = 0, expert: int = 0, front: int = 0) -> bytes:
    x, gates, ids = torch.ones(1, HIDDEN), torch.ones(1, 1), torch.tensor([[expert]])
    return wire.pack_dispatch(layer, x, gates, ids, StepId(front, number))


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, vars(record)["step"]) for record in caplog.records]


@pytest.mark.parametrize(
    ("frame", "status", "level"),
    [
        (dispatch(17, expert=1), wire.NOT_HELD, logging.INFO),
        (dispatch(17, layer=2), wire.FAILED, logging.ERROR),
    ],
)
def test_a_refusal_names_its_step(
    replica: Replica, frame: bytes, status: int, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert wire.unpack_partial(replica.answer(frame)).status == status
    assert logged(caplog) == [(level, "front-0:17")]


@pytest.mark.parametrize(
    ("x", "ids", "text"),
    [
        (torch.ones(1, 2 * HIDDEN), [[0]], "hidden size 8 was sent to a model of hidden size 4"),
        (torch.ones(1, HIDDEN), [[0, 0]], "top-k 2 was sent to a model of top-k 1"),
        (torch.ones(1, HIDDEN).bfloat16(), [[0]], "type torch.bfloat16 was sent to a model of type torch.float32"),
    ],
)
def test_a_dispatch_of_another_models_shape_is_refused(
    replica: Replica, x: torch.Tensor, ids: list[list[int]], text: str
) -> None:
    """Native kernels would read past its end."""
    frame = wire.pack_dispatch(0, x, torch.ones(1, len(ids[0]), dtype=x.dtype), torch.tensor(ids))
    answer = wire.unpack_partial(replica.answer(frame))
    assert (answer.status, answer.text) == (wire.FAILED, f"ValueError: {text}")


def test_among_dispatches_that_are_computed_together_the_wrong_one_is_named(
    replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [dispatch(17), dispatch(4, expert=1, front=256), dispatch(18)]
    caplog.set_level(logging.INFO)
    answers = replica.answer_batch([wire.unpack_dispatch(frame) for frame in frames])
    assert [wire.unpack_partial(answer).status for answer in answers] == [wire.OK, wire.NOT_HELD, wire.OK]
    assert logged(caplog) == [(logging.INFO, "front-1:4")]


def test_a_computation_that_does_not_end_is_told_to_the_supervisor(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("actors.replica.replica.time.monotonic", lambda: now[0])
    supervision = SimpleNamespace(hear=lambda: None)
    actor = SimpleNamespace(
        spec=replica.spec, replica=replica, servers=[], metrics=replica.metrics, supervision=supervision
    )
    reported = []

    def hang(*_: torch.Tensor) -> torch.Tensor:
        now[0] += 130.0
        reported.append(ExpertActor.report(actor).stuck_seconds)
        raise RuntimeError("the GPU has fallen off the bus")

    assert replica.stuck_seconds == 0
    monkeypatch.setattr(replica.store, "run", hang)
    assert wire.unpack_partial(replica.answer(dispatch(1))).status == wire.FAILED
    assert reported == [130.0]
    assert replica.stuck_seconds == 0, "it has ended, though badly"


def test_at_level_debug_each_step_of_each_front_has_one_line(
    replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for number, layer, front in [(1, 0, 0), (1, 1, 0), (9, 0, 256), (1, 1, 0), (9, 1, 256), (2, 0, 0)]:
        replica.answer(dispatch(number, layer, front=front))
    assert [step for _, step in logged(caplog)] == ["front-0:1", "front-1:9", "front-0:2"]


def test_a_warm_up_computes_a_token_and_a_large_message_for_nobody(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = replica.store.run, []

    def recorded(layer: int, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        seen.append((layer, len(x), ids.unique().tolist()))
        return run(layer, x, ids, gates)

    monkeypatch.setattr(replica.store, "run", recorded)
    replica.warm_up()
    assert seen == [(0, 1, [0]), (0, 512, [0])]
    assert replica.num_tokens == 0
    for layer in range(2):
        replica.set_experts(layer, ())
    replica.warm_up()
    assert len(seen) == 2, "without experts there is nothing to warm up"
