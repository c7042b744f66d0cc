"""The model of a step: sizes, units, and what grows with what. Round numbers, worked out by hand."""

import json
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.models.family import parse_config
from cluster.models.sizes import Sizes
from cluster.planning import cost
from cluster.planning.expert_use import ExpertUse
from cluster.planning.hardware import HardwareProfile, known_profiles, read_profile, roofline, speed_at
from cluster.planning.layout import Layout, lane_between
from cluster.planning.step_time import StepModel, queue_length
from cluster.planning.workload import Batch, ServedModel, Traffic
from tests.specs import spec_of
from tests.unit.planning_profiles import profile

PUBLISHED = json.loads((Path(__file__).parents[1] / "published_configs.json").read_text())
SPEC = spec_of({
    "hidden_size": 1000, "intermediate_size": 500, "num_hidden_layers": 10, "num_attention_heads": 10,
    "num_key_value_heads": 5, "num_local_experts": 20, "num_experts_per_tok": 2, "vocab_size": 10_000,
})  # fmt: skip
MODEL = ServedModel.of(SPEC)
BOX = profile()


def layout(fronts: int = 1, groups: int = 2, replicas: int = 1, **others: object) -> Layout:
    made = {"lane": "zmq", "front_node": BOX, "replica_node": BOX} | others
    return Layout(fronts, groups, replicas, **made)  # type: ignore[arg-type]


def seconds(batch: Batch, **changes: object) -> float:
    return StepModel(MODEL, layout(**changes)).step(batch).total  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", PUBLISHED.values(), ids=PUBLISHED)
def test_matrices_of_a_step_are_those_that_a_checkpoint_has(raw: dict[str, object]) -> None:
    """But for what is no matrix: norms, biases and the embedding, of which a step reads rows."""
    spec = parse_config(raw)
    sizes = Sizes.of(spec, "bfloat16")
    assert sizes.experts == 2 * cost.expert_weights(spec) * spec.num_experts * spec.num_expert_layers
    matrices = sum(cost.layer_weights(spec, layer) for layer in spec.layers)
    embeddings = cost.head_weights(spec) * (1 if spec.tied_head else 2)
    assert 2 * (matrices + embeddings) == pytest.approx(sizes.front, rel=0.01)
    assert sizes.kv_per_token == pytest.approx(2 * cost.kv_width(spec) * spec.num_layers, rel=0.02)


def test_one_token_reads_what_it_needs_at_the_speed_of_memory() -> None:
    found = StepModel(MODEL, layout(lane="local", groups=1)).step(Batch(decodes=1, context=100))
    # 2 bytes of: 3 matrices of 500 x 1000 for each of 2 experts, in 10 layers; at 100 GB/s.
    assert found.experts == pytest.approx(2 * 3 * 500 * 1000 * 2 * 10 / 100e9)
    assert found.head == pytest.approx(2 * 10_000 * 1000 / 100e9)
    attention = 100 * 2 * (2 * 5 * 100) * 10 / 100e9
    assert found.front == pytest.approx(2 * 10 * 1000 * (2 * 1000 + 2 * 500 + 20) / 100e9 + attention)
    assert (found.lane, found.waiting) == (0, 0)


def test_a_long_prompt_is_bound_by_products() -> None:
    model = StepModel(MODEL, layout(lane="local", groups=1))
    few, many = (model.answer(tokens) for tokens in (20_000, 40_000))
    assert many == pytest.approx(2 * few)
    assert many == pytest.approx(2 * 40_000 * 2 * 3 * 500 * 1000 / 10e12)


def test_a_message_goes_to_groups_that_have_a_tokens_expert() -> None:
    model = StepModel(MODEL, layout(groups=2))
    # Two choices of 20: both in the other 10 experts with 10/20 x 9/19.
    reached = 1 - 10 / 20 * 9 / 19
    assert MODEL.experts.reached(8, 2) == pytest.approx(8 * reached)
    asked = 2 * (1 - (1 - reached) ** 8)
    message = 2 * 1000 * 2 + 2 * 4
    expected = 100e-6 + 20e-6 * (asked - 1) + 2 * 8 * reached * message / 10e9
    assert model.lane(8) == pytest.approx(expected)


@pytest.mark.parametrize("changes", [{}, {"lane": "local", "groups": 1}, {"is_shared": True}, {"fronts": 3}], ids=str)
def test_more_work_takes_longer(changes: dict[str, object]) -> None:
    base = seconds(Batch(8, 100), **changes)
    assert seconds(Batch(16, 100), **changes) > base
    assert seconds(Batch(8, 1000), **changes) > base
    assert seconds(Batch(8, 100, 64, 64), **changes) > base
    # A step of many is cheaper than as many steps.
    assert seconds(Batch(16, 100), **changes) < 2 * base


def test_more_hardware_takes_less() -> None:
    busy = Batch(64, 100)
    assert seconds(busy, groups=4) < seconds(busy, groups=2)
    assert seconds(busy, fronts=4, replicas=2) < seconds(busy, fronts=4, replicas=1)
    assert seconds(busy, is_shared=True) > seconds(busy)


def test_a_replica_with_few_threads_holds_up_a_shared_machine() -> None:
    """Eight cores: two replicas may have all of them, eight have two each, of which two groups work at a time."""
    two, eight = (StepModel(MODEL, layout(replicas=n, is_shared=True)).answer(8) for n in (1, 4))
    assert eight == pytest.approx(two * 8 / (2 * 2) * MODEL.experts.imbalance(8, 2))


def test_replicas_of_a_group_help_only_where_fronts_wait_for_each_other() -> None:
    assert seconds(Batch(8, 100), replicas=3) == pytest.approx(seconds(Batch(8, 100), replicas=1))


def test_fronts_wait_for_a_replica_as_closed_queues_do() -> None:
    # One other that does not think is always in service, two of them one behind the other.
    assert queue_length(0, 5.0, 2.0, 1) == 0
    assert queue_length(1, 0.0, 2.0, 1) == 1
    assert queue_length(2, 0.0, 2.0, 1) == 2
    assert queue_length(1, 2.0, 2.0, 1) == 0.5
    assert queue_length(3, 1e9, 2.0, 1) == pytest.approx(0, abs=1e-6)
    assert queue_length(3, 1.0, 2.0, 2) < queue_length(3, 1.0, 2.0, 1)


def test_a_front_waits_for_what_others_compute_not_for_what_it_does_itself() -> None:
    model = StepModel(MODEL, layout(fronts=3))
    busy, idle = (model.step(Batch(1, 100), others).waiting for others in (Batch(64, 100), Batch()))
    assert busy > model.step(Batch(1, 100)).waiting > idle == 0


def test_even_choices_touch_as_many_experts_as_chance_says() -> None:
    use = ExpertUse.even(SPEC)
    assert use.touched(1) == pytest.approx(2)
    assert use.touched(2) == pytest.approx(2 + 2 * 18 / 20)
    assert use.touched(1000) == pytest.approx(20)


def test_measured_counts_touch_fewer_experts_and_are_less_even() -> None:
    counts = [[1000] * 4 + [10] * 16 for _ in range(10)]
    hot, even = ExpertUse.measured(SPEC, counts), ExpertUse.even(SPEC)
    assert hot.touched(8) < even.touched(8)
    one = [[1000] + [10] * 19 for _ in range(10)]
    assert ExpertUse.measured(SPEC, one).imbalance(10_000, 4) > 3 > 1.1 > even.imbalance(10_000, 4)
    assert even.imbalance(1, 20) == pytest.approx(min(20, even.imbalance(1, 20)))
    assert even.imbalance(5, 1) == 1


def test_counts_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="expert_counts=1 layers x 3 experts, the model has 10 x 20"):
        ExpertUse.measured(SPEC, [[1, 2, 3]])


def test_speeds_lie_between_what_was_measured() -> None:
    points = roofline(100.0, 10.0)
    assert speed_at(points, 1) == speed_at(points, 50) == pytest.approx(100e9)
    assert speed_at(points, 100) == pytest.approx(100e9)
    # 10 TFLOP/s and 1000 rows: 10e12 / (2 x 1000) weights of 2 bytes.
    assert speed_at(points, 1000) == pytest.approx(10e9)


def test_traffic_is_a_rate_or_a_number_at_a_time() -> None:
    assert Traffic(100, 50, rate=1.0).mean_context == 125
    for rate, concurrency in ((None, None), (1.0, 1.0)):
        with pytest.raises(ConfigError, match="give one of them"):
            Traffic(1, 1, rate, concurrency)
    with pytest.raises(ConfigError, match="rate=-1: choose more than 0"):
        Traffic(1, 1, rate=-1.0)


def test_what_is_left_when_an_actor_or_a_node_is_lost() -> None:
    assert layout(fronts=2, replicas=2).after_actors() == (layout(1, 2, 2), layout(2, 2, 1))
    assert layout(fronts=1, replicas=1).after_actors() == (None, None)
    assert layout(fronts=3, lane="local").after_actors() == (layout(fronts=2, lane="local"),)
    four = profile("four", devices=4)
    spread = layout(fronts=2, groups=2, replicas=3, front_node=four, replica_node=four)
    assert spread.num_nodes == 2
    assert [(left.fronts, left.replicas) for left in spread.after_node() if left] == [(1, 1)]
    assert layout(fronts=2, groups=1, replicas=2, front_node=four, replica_node=four).after_node() == (None,)


def test_the_lane_depends_on_who_is_on_one_host() -> None:
    four = profile("four", devices=4)
    assert (lane_between(four, four, 4), lane_between(four, four, 5), lane_between(four, BOX, 2)) == (
        "unix", "zmq", "zmq",
    )  # fmt: skip


@pytest.mark.parametrize("name", known_profiles())
def test_profiles_that_come_with_outcrop_can_be_read(name: str) -> None:
    found = read_profile(name)
    assert found.name == name
    assert (found.source == "data sheet") == (found.device == "cuda")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": 2}, "version=2"),
        ({"memory": 3}, "memory=3 is unknown: did you mean memory_gib?"),
        ({"cores": 0}, "cores=0"),
        ({"linears": [{"rows": 8, "gb_per_second": 1}, {"rows": 1, "gb_per_second": 1}]}, "rows must ascend"),
    ],
    ids=str,
)
def test_a_wrong_profile_is_refused_by_name(tmp_path: Path, changes: dict[str, object], told: str) -> None:
    file = tmp_path / "box.json"
    file.write_text(json.dumps(BOX.model_dump(mode="json") | changes))
    with pytest.raises(ConfigError) as error:
        read_profile(str(file))
    assert told in str(error.value)


def test_a_profile_that_is_missing_names_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"hardware='b200x' can't be read.*h100"):
        read_profile("b200x")


def test_a_lane_that_was_not_measured_is_refused() -> None:
    assert isinstance(BOX, HardwareProfile)
    with pytest.raises(ConfigError, match="lacks object_ref"):
        BOX.lane("object_ref")
