"""A simulated cluster does what a real one does: requests end once, the dead are replaced, policies decide."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.dispatch.failover import DEADLINE_FLOOR_S, LAST_DEADLINE_FACTOR, LAST_DEADLINE_S
from actors.simulation.comparison import variants
from actors.simulation.control import RAY_NOTICES_S
from actors.simulation.failures import parse_failures
from actors.simulation.options import Options
from actors.simulation.outcome import Outcome
from actors.simulation.simulation import Simulation
from actors.simulation.traffic import poisson
from benchmarks.make_checkpoint import SHAPES
from cluster.config import ClusterConfig
from cluster.control.reports import HUNG_S
from cluster.errors import ConfigError
from cluster.models.family import parse_config
from cluster.planning.hardware import read_profile
from cluster.planning.layout import Layout
from cluster.planning.workload import Batch, ServedModel
from deploy.cli.main import app

H100 = read_profile("h100")
MODEL = ServedModel.of(parse_config(SHAPES["1b-a400m"]))


def options(
    fail: str = "", *, fronts: int = 2, groups: int = 4, replicas: int = 2, seconds: float = 120.0, rate: float = 5.0,
    seed: int = 0, node: int = 1, **settings: Any,
) -> Options:  # fmt: skip
    config = ClusterConfig(model="m", fronts=fronts, groups=groups, replicas=replicas, **settings)
    profile = H100.model_copy(update={"devices": node, "cost_per_hour": 2.0})
    layout = Layout(fronts, groups, replicas, "zmq", profile, profile)
    traffic = partial(poisson, rate, seconds, 300, 50, seed)
    return Options(config, MODEL, layout, traffic, seconds, parse_failures(fail), seed)


def run(*args: Any, **named: Any) -> Outcome:
    return Simulation(options(*args, **named)).run()


FAULTS = "kill 2 replicas at 20 s; node at 40 s; kill 1 front at 60 s; hot expert from 70 s"


def test_the_same_seed_tells_the_same_story_and_another_one_another() -> None:
    first, again, other = (run(FAULTS, seed=seed, autoscale=True) for seed in (3, 3, 4))
    assert first == again
    assert first.figures() != other.figures()


@pytest.mark.parametrize("fail", ["", FAULTS, "kill 2 fronts at 30 s", "kill 8 replicas at 30 s"])
def test_each_request_ends_once(fail: str) -> None:
    simulation = Simulation(options(fail))
    outcome = simulation.run()
    asked = len(list(options().arrivals()))
    assert outcome.num_requests == asked > 400
    assert outcome.num_finished + outcome.num_refused == asked
    assert len(outcome.ttft) == outcome.num_finished
    for front in simulation.fronts.values():
        front.scheduler.check_integrity()
        assert (front.requests, front.outstanding, front.scheduler.has_work) == ({}, 0, False)


def test_no_token_comes_before_its_request_and_nothing_takes_no_time() -> None:
    outcome = run()
    assert min(outcome.ttft) > H100.http.request_ms / 1000 * 0.5
    assert min(outcome.tpot) > 0
    assert outcome.stalls == []


def test_full_queues_refuse_and_what_can_never_fit_is_refused() -> None:
    outcome = run(rate=60.0, seconds=60.0, max_num_seqs=2, max_num_waiting=4)
    assert outcome.num_refused > 0
    assert outcome.num_finished + outcome.num_refused == outcome.num_requests
    assert run(max_model_len=10).num_finished == 0


def test_a_killed_replica_costs_its_messages_and_a_successor_serves_in_time() -> None:
    outcome = run("kill 1 replica at 20 s")
    assert 1 <= len(outcome.stalls) <= 2, "of each front that computes, one message"
    assert all(stall.seconds < DEADLINE_FLOOR_S for stall in outcome.stalls), "a connection that closes is seen at once"
    killed, serves = (at for at, _ in outcome.events)
    assert killed + RAY_NOTICES_S + 10.0 < serves < killed + RAY_NOTICES_S + 12.0


def test_silence_costs_a_deadline_and_less_than_a_takeover() -> None:
    outcome = run("node at 20 s", rate=20.0)
    assert outcome.stalls
    for stall in outcome.stalls:
        assert DEADLINE_FLOOR_S <= stall.seconds < HUNG_S


def test_without_another_replica_the_last_one_is_waited_for_longer() -> None:
    outcome = run("node at 20 s", replicas=1, rate=20.0)
    longest = max(stall.seconds for stall in outcome.stalls)
    assert LAST_DEADLINE_S <= longest < LAST_DEADLINE_FACTOR * HUNG_S


def test_a_front_computes_for_a_group_without_a_replica() -> None:
    replicas = Simulation(options(replicas=1)).replicas
    batch = Batch(decodes=8, context=256)
    before = replicas.timed(batch).seconds
    replicas.lose("expert-g1-r0", is_silent=True)
    without = replicas.timed(batch).seconds
    replicas.join(1)
    assert without > before == replicas.timed(batch).seconds


def test_without_a_budget_nothing_is_hedged() -> None:
    hedged, patient = run("node at 20 s"), Simulation(
        dataclasses.replace(options("node at 20 s"), hedge_share=0.0)
    ).run()  # fmt: skip
    assert max(s.seconds for s in hedged.stalls) < LAST_DEADLINE_S <= min(s.seconds for s in patient.stalls)


def test_a_lost_front_is_replayed_and_replaced() -> None:
    outcome = run("kill 1 front at 30 s", fronts=4, rate=8.0)
    assert outcome.num_replayed > 0
    assert outcome.num_refused == 0
    assert [what for _, what in outcome.events][-1] == "a front serves"


def test_fronts_with_all_experts_lose_no_replica_and_are_replaced_when_their_node_is_lost() -> None:
    base = options("kill 3 replicas at 10 s; node at 30 s", fronts=3, groups=1, replicas=1, lane="local", rate=40.0)
    outcome = Simulation(dataclasses.replace(base, layout=dataclasses.replace(base.layout, lane="local"))).run()
    assert outcome.num_finished == outcome.num_requests
    assert [what.split(",")[0].split(" ", 1)[1] for _, what in outcome.events] == ["falls silent", "front serves"]
    assert outcome.num_replayed > 0


def test_a_rebalance_brings_balance_back_after_an_expert_is_hot() -> None:
    fail = "hot expert from 90 s"
    kept = run(fail, seconds=600.0)
    moved = run(fail, seconds=600.0, rebalance_interval_s=60.0, redundant_experts=4, load_window_s=60.0)
    (_, before), (_, after) = kept.balancedness[:2]
    assert before > after + 0.05
    assert any("rebalanced" in what for _, what in moved.events)
    assert moved.balancedness[-1][1] > kept.balancedness[-1][1] + 0.05


def test_a_busy_cluster_is_scaled_up_and_costs_more() -> None:
    busy = {"rate": 60.0, "groups": 2, "replicas": 1, "fronts": 4, "seconds": 120.0}
    fixed, scaled = run(**busy), run(**busy, autoscale=True, max_fronts=16, max_num_seqs=8)
    assert any("fronts: 4 ->" in what for _, what in scaled.events)
    assert fixed.cost is not None
    assert scaled.cost is not None
    assert scaled.cost / scaled.seconds > fixed.cost / fixed.seconds


def test_runs_of_like_steps_say_what_single_steps_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes an hour cheap must not change what it says."""
    together = run(seconds=60.0)
    monkeypatch.setattr("actors.simulation.front._num_left", lambda chunk: 1)
    apart = run(seconds=60.0)
    assert together.num_finished == apart.num_finished
    for kind in ("ttft_ms", "tpot_ms"):
        ours, oracle = together.figures()[kind], apart.figures()[kind]
        assert ours == pytest.approx(oracle, rel=0.05)


def test_policies_are_compared_by_name_and_wrong_ones_are_named() -> None:
    base = options(groups=4)
    found = dict(variants(base, "redundant_experts=0,4; hedge_share=0"))
    assert list(found) == ["as planned", "redundant_experts=0", "redundant_experts=4", "hedge_share=0"]
    assert found["redundant_experts=4"].config.redundant_experts == 4
    assert found["hedge_share=0"].hedge_share == 0
    for text, told in (("nothing=1", "compare='nothing=1': write"), ("redundant_experts=1", "no multiple of groups"),
                       ("spread=x", "spread='x' is no number")):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            list(variants(base, text))


def test_the_command_reads_a_plan_and_prints_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["1b-a400m"]))
    plan, out = tmp_path / "plan.yaml", tmp_path / "out.json"
    plan.write_text(f"model: {tmp_path}\nfronts: 2\ngroups: 4\nreplicas: 2\n")
    flags = ["--hardware", "h100", "--hours", "0.02", "--rate", "5", "--fail", "kill 1 replica at 20 s"]
    done = CliRunner().invoke(app, ["simulate", str(plan), *flags, "--compare", "hedge_share=0", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "is killed" in done.output
    assert {"as planned", "hedge_share=0"} == set(json.loads(out.read_text()))
    assert json.loads(out.read_text())["as planned"]["figures"]["finished"] > 200
    wrong = CliRunner().invoke(app, ["simulate", str(plan), *flags[:-1], "kill it"])
    assert wrong.exit_code != 0


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--rate", "nan"), "rate=nan: choose more than 0"),
        (("--hours", "inf"), "hours=inf: choose more than 0"),
        (("--load-gb-per-second", "0"), "load_gb_per_second=0: choose"),
        (("--compare", "lane=zmq"), "lane is the same for all that are compared"),
        (("--compare", "spread=-1"), "must be a number, and not below 0"),
        (("--json", "/"), "json='/' can't be written"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, asked: tuple[str, ...], told: str) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("model: demo\nfronts: 1\ngroups: 2\nreplicas: 2\n")
    flags = ("--hardware", "h100", "--hours", "0.01")
    done = CliRunner().invoke(app, ["simulate", str(plan), *flags, *asked])
    assert done.exit_code == 1, done.output
    assert told in " ".join(done.output.split())


def test_a_plan_that_does_not_fit_is_not_simulated_and_the_shell_changes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, config = tmp_path / "plan.yaml", tmp_path / "config.json"
    published = json.loads((Path(__file__).parents[2] / "published_configs.json").read_text())
    config.write_text(json.dumps(published["Qwen/Qwen3-235B-A22B"]))
    plan.write_text("model: Qwen/Qwen3-235B-A22B\nfronts: 1\ngroups: 2\nreplicas: 1\n")
    monkeypatch.setenv("OUTCROP_GROUPS", "64")
    flags = ("--hardware", "l4", "--hours", "0.01", "--model", str(config))
    done = CliRunner().invoke(app, ["simulate", str(plan), *flags])
    assert done.exit_code == 1, done.output
    assert "does not fit the memory of l4" in " ".join(done.output.split())


def test_a_simulation_loads_neither_torch_nor_ray() -> None:
    code = "import actors.simulation.simulation, sys; print({'torch', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"
