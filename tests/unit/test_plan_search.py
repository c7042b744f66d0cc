"""Steady traffic, memory, and which layouts are found: by hand where it can be, else by what must grow with what."""

from dataclasses import replace

import pytest

from cluster.planning import memory
from cluster.planning.hardware import HardwareProfile
from cluster.planning.layout import Layout
from cluster.planning.search import Fleet, Judge, layouts, pareto, search
from cluster.planning.steady_state import Serving
from cluster.planning.workload import Batch, Goals, ServedModel, Traffic
from tests.unit.planning_profiles import profile
from tests.unit.test_planning import MODEL, SPEC

GPU = profile("gpu", device="cuda", memory_gib=64.0)
TRAFFIC = Traffic(100, 100, rate=1.0)
EASY = Goals(ttft_s=10.0, tpot_s=1.0)


def local(fronts: int = 1, node: HardwareProfile = GPU) -> Layout:
    return Layout(fronts, 1, 1, "local", node, node)


def apart(fronts: int, groups: int, replicas: int, node: HardwareProfile = GPU) -> Layout:
    return Layout(fronts, groups, replicas, "zmq", node, node)


def test_weights_and_cache_are_those_of_the_models_sizes() -> None:
    sizes = MODEL.sizes
    assert memory.front_weights(MODEL, apart(1, 2, 1)) == sizes.front
    assert memory.front_weights(MODEL, local()) == sizes.front + sizes.experts
    assert memory.replica_weights(MODEL, apart(1, 4, 3)) == sizes.experts / 4
    room = 0.9 * 64 * 2**30 - sizes.front
    assert memory.kv_bytes(MODEL, apart(2, 2, 2)) == pytest.approx(room)
    assert memory.most_sequences(MODEL, apart(1, 2, 1), 1000) == int(room // (1000 * sizes.kv_per_token))


def test_actors_of_one_machine_share_its_memory() -> None:
    shared = Layout(1, 2, 2, "unix", GPU, GPU, is_shared=True)
    expected = 0.9 * 64 * 2**30 - MODEL.sizes.front - 2 * MODEL.sizes.experts
    assert memory.kv_bytes(MODEL, shared) == pytest.approx(expected)


def test_what_does_not_fit_is_no_layout() -> None:
    small = profile("small", memory_gib=0.7 * MODEL.sizes.experts / 2**30)
    fitting = [each for each in layouts(MODEL, [Fleet(small, 8)]) if memory.most_sequences(MODEL, each, 200)]
    assert fitting
    assert not [each for each in fitting if each.is_local or each.groups == 1 or each.is_shared]


def test_little_traffic_runs_step_by_step() -> None:
    found = Serving(MODEL, local(), TRAFFIC).at(1e-3)
    assert not found.limit
    alone = Serving(MODEL, local(), TRAFFIC).steps.step(Batch(1, 150)).total
    assert found.tpot_s == pytest.approx(alone, rel=0.02)


def test_as_many_run_as_littles_law_says() -> None:
    found = Serving(MODEL, local(), TRAFFIC).at(20.0)
    assert found.running == pytest.approx(20.0 * 100 * found.tpot_s, rel=0.01)


def test_a_number_at_a_time_is_the_rate_that_keeps_so_many_busy() -> None:
    serving = Serving(MODEL, local(), Traffic(100, 100, concurrency=8))
    found = serving.at(serving.rate)
    assert serving.rate * (found.ttft_s + 99 * found.tpot_s) == pytest.approx(8, rel=0.02)


def test_more_traffic_is_slower_until_a_goal_is_missed() -> None:
    serving, goals = Serving(MODEL, local(), TRAFFIC), Goals(1.0, 0.01)
    most = serving.capacity(goals)
    states = [serving.at(most.rate * share) for share in (0.1, 0.5, 0.9)]
    assert states == sorted(states, key=lambda each: each.tpot_s)
    assert [each.ttft_s for each in states] == sorted(each.ttft_s for each in states)
    assert most.limit
    assert Serving(MODEL, local(), replace(TRAFFIC, rate=most.rate * 1.1)).under(goals).limit


def test_a_goal_that_one_token_misses_bears_nothing() -> None:
    found = Serving(MODEL, local(), TRAFFIC).capacity(Goals(1.0, 1e-6))
    assert (found.rate, found.limit) == (0.0, "TPOT")


def test_fronts_add_up_where_nothing_is_shared() -> None:
    one, two = (Serving(MODEL, local(n), TRAFFIC).capacity(EASY).rate for n in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.02)


def test_http_takes_cores_of_a_shared_machine_only() -> None:
    slow = profile("slow-http", http={"token_us": 1e5, "request_ms": 0})
    shared = Layout(1, 2, 1, "unix", slow, slow, is_shared=True)
    with_http, apart_of_it = (Serving(MODEL, each, TRAFFIC).at(1.0) for each in (shared, apart(1, 2, 1, slow)))
    assert with_http.tpot_s > apart_of_it.tpot_s + 0.01


def test_the_cheapest_that_holds_comes_first() -> None:
    cheap = GPU.model_copy(update={"name": "cheap", "cost_per_hour": 1.0})
    dear = GPU.model_copy(update={"name": "dear", "cost_per_hour": 9.0})
    best = search(MODEL, [Fleet(dear, 2), Fleet(cheap, 2)], TRAFFIC, EASY)[0]
    assert best.holds
    assert best.layout.num_devices == {"cheap": 1}
    assert best.cost_per_million_tokens == pytest.approx(1e6 / (3600 * 1.0 * 100))


def test_to_survive_takes_another_one() -> None:
    fleet = [Fleet(GPU, 4)]
    assert search(MODEL, fleet, TRAFFIC, EASY)[0].layout == local(1)
    assert search(MODEL, fleet, TRAFFIC, replace(EASY, survive=1))[0].layout == local(2)
    assert search(MODEL, fleet, TRAFFIC, replace(EASY, survive=2))[0].layout == local(3)


def test_what_is_left_is_what_the_smaller_layout_bears() -> None:
    judge = Judge(MODEL, TRAFFIC, EASY)
    found = judge(apart(2, 2, 2))
    assert found.left_without_actor == min(judge.most(apart(1, 2, 2)).rate, judge.most(apart(2, 2, 1)).rate)
    assert judge(apart(1, 2, 2)).left_without_actor == 0


def test_shares_of_time_are_shares() -> None:
    for layout in (local(2), apart(3, 2, 1), Layout(1, 2, 1, "unix", GPU, GPU, is_shared=True)):
        busy = Judge(MODEL, TRAFFIC, EASY)(layout).busy
        assert all(0 < share <= 1 for share in (busy.front, busy.experts, busy.kv_cache)), layout


def test_looser_goals_bear_more() -> None:
    plans = search(MODEL, [Fleet(GPU, 2)], TRAFFIC, Goals(10.0, 0.01))
    points = pareto(plans, MODEL, Goals(10.0, 0.01))
    assert points == sorted(points)
    assert [tokens for _, tokens in points] == sorted(tokens for _, tokens in points)


def test_float32_weighs_twice() -> None:
    wide = ServedModel.of(SPEC, "float32")
    assert wide.sizes.experts == 2 * MODEL.sizes.experts
