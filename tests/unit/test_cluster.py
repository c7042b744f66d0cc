"""The deciding parts of `cluster`: plain data in, plain data out."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import ClusterConfig, load_config
from cluster.control.exposition import INGRESS_GONE_S, Exposition
from cluster.errors import ConfigError
from cluster.expert_map import ExpertMap, ReplicaAddress, contiguous_homes
from cluster.messages.actors import Machine, Wanted
from cluster.messages.state import ClusterState, State
from cluster.metrics import PREFIX, TABLE, Metrics, cumulative, exposition, merge
from cluster.policy.blueprint import check_expert_dtype, draw_blueprint
from cluster.policy.expert_load import ExpertLoad
from cluster.policy.resources import plan_resources
from tests.specs import described, spec_of

# -- configuration ---------------------------------------------------------------------------------------------------


def test_explicit_wins_over_environment_over_yaml_over_default(tmp_path: Path) -> None:
    file = tmp_path / "outcrop.yaml"
    file.write_text("model: from-yaml\nfronts: 3\ngroups: 4\nreplicas: 5\n")
    environ = {"OUTCROP_GROUPS": "8", "OUTCROP_REPLICAS": "6", "PATH": "/bin"}
    config = load_config({"replicas": 7, "port": None}, file, environ)
    assert (config.model, config.fronts, config.groups, config.replicas, config.port) == ("from-yaml", 3, 8, 7, 8000)


def test_every_setting_has_an_environment_twin() -> None:
    values = {
        "api_key": "k",
        "name": "a",
        "max_num_batched_tokens": "512",
        "lane": "local",
        "kernels": "torch",
        "dtype": "float32",
        "expert_dtype": "int8",
        "device": "cpu",
        "front_device": "cpu",
        "replica_device": "cpu",
        "enable_prefix_caching": "false",
        "redundant_experts": "2",
        "otlp_traces_endpoint": "http://1",
        "allowed_origins": "https://1",
        "log_level": "info",
        "tool_call_parser": "none",
        "log_format": "json",
        "front_resources": '{"a": 1}',
        "ingress_resources": '{"c": 1}',
        "replica_resources": '{"b": 1}',
    }
    for name in ClusterConfig.model_fields:
        environ = {f"OUTCROP_{name.upper()}": values.get(name, "1"), "OUTCROP_MODEL": "1"}
        assert name in load_config({}, None, environ).model_fields_set


def test_a_kubernetes_service_named_outcrop_does_not_set_the_port() -> None:
    assert load_config({"model": "m"}, None, {"OUTCROP_PORT": "tcp://10.0.0.1:8000"}).port == 8000


def test_lists_are_text_where_there_are_only_texts() -> None:
    environ = {"OUTCROP_ALLOWED_HOSTS": " A.example, *.b.example ,", "OUTCROP_ALLOWED_ORIGINS": "*"}
    config = load_config({"model": "m"}, None, environ)
    assert (config.allowed_hosts, config.allowed_origins) == (["a.example", "*.b.example"], ["*"])
    explicit = load_config({"model": "m", "allowed_hosts": "", "allowed_origins": ["http://[::1]:80"]}, None, environ)
    assert (explicit.allowed_hosts, explicit.allowed_origins) == ([], ["http://[::1]:80"])


@pytest.mark.parametrize(
    ("explicit", "message"),
    [
        ({}, "model: Field required"),
        ({"model": "m", "groops": 2}, "groops=2 is unknown: did you mean groups?"),
        ({"model": "m", "groups": 0}, "groups=0: Input should be greater than or equal to 1"),
        (
            {"model": "m", "lane": "smoke"},
            "lane='smoke': Input should be 'auto', 'object_ref', 'unix', 'zmq' or 'local'",
        ),
        ({"model": "m", "name": "A"}, "name='A': Value error, must be up to 40 lower-case letters"),
        ({"model": "m", "name": "v1"}, "name='v1': Value error, is a route of the API: choose a name other than"),
        ({"model": "m", "max_num_seqs": 64, "max_num_batched_tokens": 8}, "max_num_seqs=64 is more than"),
        ({"model": "m", "allowed_hosts": "http://a.example"}, "'http://a.example' is no host name: write a.example"),
        ({"model": "m", "allowed_hosts": "a.example:8000"}, "'a.example:8000' is no host name"),
        ({"model": "m", "allowed_origins": "a.example"}, "'a.example' is no origin: write https://a.example"),
        ({"model": "m", "allowed_origins": ["https://a.example/"]}, "'https://a.example/' is no origin"),
    ],
)
def test_bad_settings_are_named(explicit: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(explicit, None, {})
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ["- a\n", "a: [", "\x00"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config({"model": "m"}, file, {})


def test_the_key_does_not_show() -> None:
    config = load_config({"model": "m", "api_key": "s3cret"}, None, {})
    assert "s3cret" not in repr(config) + str(config.model_dump())


# -- expert map ------------------------------------------------------------------------------------------------------


def test_groups_get_equal_runs_of_experts() -> None:
    expert_map = ExpertMap(0, 4, contiguous_homes(2, 8, 4))
    expert_map.check_integrity()
    assert expert_map.experts_of(2) == ((4, 5), (4, 5))


def test_groups_that_do_not_divide_are_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="groups=7 does not divide 40 experts: choose 1, 2, 4, 5, 8, 10, 20 or 40"):
        contiguous_homes(1, 40, 7)


def test_each_change_is_a_new_version() -> None:
    a, b = (ReplicaAddress(f"r{group}", group, (("object_ref", "x"),)) for group in (0, 1))
    first = ExpertMap(0, 2, contiguous_homes(2, 4, 2)).with_replicas((a, b))
    assert (first.version, first.replicas_of(1)) == (1, (b,))
    moved = first.with_homes(1, ((1,), (1, 0), (0,), (0,)))
    assert (moved.version, moved.homes[0]) == (2, first.homes[0])
    assert moved.experts_of(0) == ((0, 1), (1, 2, 3))
    assert moved.experts_of(1) == ((2, 3), (0, 1))


def test_integrity_notices_a_replica_twice() -> None:
    a = ReplicaAddress("r", 0, ())
    with pytest.raises(AssertionError, match="twice"):
        ExpertMap(1, 1, contiguous_homes(1, 2, 1), (a, a)).check_integrity()


# -- state -----------------------------------------------------------------------------------------------------------


def test_requests_wait_while_the_cluster_recovers_and_it_is_not_up_then() -> None:
    states = {state: ClusterState(state, "", "") for state in get_args(State)}
    assert {state for state, told in states.items() if told.is_up} == {"ready", "degraded"}
    assert {state for state, told in states.items() if told.is_serving} == {"ready", "degraded", "recovering"}


# -- load ------------------------------------------------------------------------------------------------------------


def test_load_adds_up_over_fronts_and_restarts() -> None:
    load = ExpertLoad(1, 4)
    load.update({"f0": ((1, 0, 0, 3),), "f1": ((1, 1, 0, 0),)}, now=0)
    load.update({"f0": ((2, 0, 0, 4),)}, now=1)
    load.update({"f0": ((0, 1, 0, 0),), "f1": ()}, now=2)  # f0 was restarted, f1 has not counted yet
    assert load.counts == [[3, 2, 0, 4]]


def test_recent_load_forgets_what_is_older_than_the_window() -> None:
    load = ExpertLoad(1, 2, window_s=30)
    for second in range(100):
        load.update({"f": ((min(second, 50), max(0, second - 50)),)}, now=second)
        assert min(second, 30) <= sum(load.recent[0]) <= 31, "it slides in steps of a second"
    assert load.counts == [[50, 49]]
    assert load.recent[0][0] == 0


def test_balancedness_is_mean_over_max_of_group_loads() -> None:
    expert_map = ExpertMap(0, 2, contiguous_homes(2, 4, 2))
    load = ExpertLoad(2, 4)
    assert load.balancedness(expert_map) == 1.0
    load.update({"f": ((3, 3, 1, 1), (2, 2, 2, 2))}, now=0)
    assert load.balancedness(expert_map) == pytest.approx((4 / 6 + 1) / 2)


# -- resources -------------------------------------------------------------------------------------------------------

LAPTOP = Machine(cluster_cpus=2, cluster_gpus=0, largest_node_cpus=2)
SMALL = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2}
GPU_BOX = Machine(cluster_cpus=64, cluster_gpus=8, largest_node_cpus=64)


@pytest.mark.parametrize(("groups", "replicas", "fronts"), [(2, 1, 1), (4, 2, 1), (8, 4, 3)])
def test_actors_always_fit_a_small_machine(groups: int, replicas: int, fronts: int) -> None:
    plan = plan_resources(ClusterConfig(model="m", groups=groups, replicas=replicas, fronts=fronts), LAPTOP)
    assert fronts * plan.cpus_per_front + groups * replicas * plan.cpus_per_replica <= 2
    assert plan.threads_per_replica * groups * replicas <= max(2, groups * replicas)
    assert plan.front_device == plan.replica_device == "cpu"


def test_a_front_uses_all_cores_while_replicas_wait() -> None:
    plan = plan_resources(ClusterConfig(model="m"), LAPTOP)
    assert (plan.threads_per_front, plan.threads_per_replica) == (2, 1)


@pytest.mark.parametrize(
    ("settings", "threads"),
    [({}, 2), ({"groups": 1}, 2), ({"threads_per_replica": 1}, 1), ({"groups": 4, "replicas": 2}, 1)],
)
def test_native_kernels_use_the_cores_that_other_replicas_leave(settings: dict[str, int], threads: int) -> None:
    plan = plan_resources(ClusterConfig(model="m", groups=settings.pop("groups", 2), **settings), LAPTOP)
    assert plan.native_threads_per_replica == threads


def test_gpus_are_taken_when_there_are_enough() -> None:
    assert plan_resources(ClusterConfig(model="m"), GPU_BOX).gpus_per_replica == 1
    assert plan_resources(ClusterConfig(model="m", groups=8), GPU_BOX).replica_device == "cpu"
    assert plan_resources(ClusterConfig(model="m", device="cpu"), GPU_BOX).gpus_per_front == 0


def test_cuda_without_enough_gpus_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"device='cuda' needs 9 GPUs for 1 fronts and 8 expert replicas"):
        plan_resources(ClusterConfig(model="m", device="cuda", groups=8), GPU_BOX)


@pytest.mark.parametrize(
    ("settings", "front", "replica"),
    [
        ({"front_device": "cuda", "replica_device": "cpu"}, ("cuda", 1), ("cpu", 0)),
        ({"device": "cpu", "replica_device": "cuda"}, ("cpu", 0), ("cuda", 1)),
        ({"device": "cuda", "replica_device": "cpu", "groups": 16}, ("cuda", 1), ("cpu", 0)),
        ({"replica_device": "cpu", "groups": 16}, ("auto", 1), ("cpu", 0)),
        ({"gpus_per_replica": 0, "groups": 16}, ("auto", 1), ("cpu", 0)),
        ({"front_device": "cuda", "groups": 16}, ("cuda", 1), ("cpu", 0)),  # no GPUs left for all replicas
        ({"gpus_per_front": 0.5, "gpus_per_replica": 0.5}, ("auto", 0.5), ("auto", 0.5)),
    ],
)
def test_fronts_and_replicas_have_devices_of_their_own(
    settings: dict[str, Any], front: tuple[str, float], replica: tuple[str, float]
) -> None:
    config = ClusterConfig(model="m", **{"groups": 2} | settings)
    plan = plan_resources(config, GPU_BOX)
    assert (plan.front_device, plan.gpus_per_front) == front
    assert (plan.replica_device, plan.gpus_per_replica) == replica
    blueprint = draw_blueprint(config, described(spec_of(SMALL | {"num_local_experts": 16})), "/m", GPU_BOX)
    assert blueprint.replica(0, 0, blueprint.expert_map).device == replica[0]
    # What a front computes in a replica's place is computed where the replica would have.
    assert (blueprint.engine.device, blueprint.engine.expert_device) == (
        front[0],
        "cpu" if replica[0] == "cpu" else front[0],
    )
    assert blueprint.engine.block_size == (16 if front[0] == "cpu" else 256)


DEVICES = [None, "auto", "cpu", "cuda"]


@pytest.mark.parametrize("front_device", DEVICES)
@pytest.mark.parametrize("replica_device", DEVICES)
@pytest.mark.parametrize("gpus", [None, 0, 0.5])
@pytest.mark.parametrize(("expert_dtype", "dtype"), [("auto", "float32"), ("auto", "bfloat16"), ("int8", "bfloat16")])
@pytest.mark.parametrize("machine", [LAPTOP, GPU_BOX], ids=["laptop", "gpus"])
def test_devices_gpus_and_types_fit_each_other_or_are_refused(
    machine: Machine, front_device: Any, replica_device: Any, gpus: float | None, expert_dtype: Any, dtype: Any
) -> None:
    config = ClusterConfig(
        model="m", front_device=front_device, replica_device=replica_device, dtype=dtype, expert_dtype=expert_dtype,
        gpus_per_front=gpus, gpus_per_replica=gpus,
    )  # fmt: skip
    blueprint, refused = None, ""
    try:
        blueprint = draw_blueprint(config, described(spec_of(SMALL)), "/m", machine)
    except ConfigError as error:
        refused = str(error)
    if blueprint is None:
        asked = "cuda" in (front_device, replica_device)
        assert (asked and (gpus == 0 or machine is LAPTOP)) or (expert_dtype == "int8" and "int8" in refused)
        return
    front, replica = blueprint.front(0), blueprint.replica(0, 0, blueprint.expert_map)
    plan = blueprint.resources
    for device, share, wanted in (
        (front.engine.device, plan.gpus_per_front, front_device),
        (replica.device, plan.gpus_per_replica, replica_device),
    ):
        assert device in ("cpu", "auto", "cuda")
        if machine is GPU_BOX:
            assert (device == "cpu") == (share == 0 or wanted == "cpu"), "without a GPU it computes on the CPU"
        else:
            assert device == "cpu"
        assert wanted not in ("cpu", "cuda") or device == wanted
    assert expert_dtype != "int8" or replica.device == "cpu"
    assert front.engine.expert_device == ("cpu" if replica.device == "cpu" else front.engine.device)
    assert plan.threads_per_front <= (64 if front.engine.device == "cpu" else 4)


def test_a_gpu_that_is_asked_for_and_not_reserved_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpus_per_replica=0 with device='cuda'.*replica_device to cpu"):
        plan_resources(ClusterConfig(model="m", device="cuda", gpus_per_replica=0), GPU_BOX)
    plan_resources(ClusterConfig(model="m", device="cuda", lane="local", gpus_per_replica=0), GPU_BOX)


def test_the_blueprint_names_every_actor_and_its_experts() -> None:
    model = spec_of(SMALL)
    config = ClusterConfig(model="m", groups=2, replicas=2, fronts=2)
    stored = described(model)
    blueprint = draw_blueprint(config, stored, "/m", LAPTOP)
    assert blueprint.wanted == Wanted(2, (2, 2))
    assert blueprint.front(1).actor_id == "front-1"
    replica = blueprint.replica(1, 0, blueprint.expert_map)
    assert (replica.actor_id, replica.group) == ("expert-g1-r0", 1)
    assert replica.experts == ((4, 5, 6, 7), (4, 5, 6, 7))
    assert blueprint.engine.dtype == "bfloat16"
    int8 = draw_blueprint(config.model_copy(update={"expert_dtype": "int8"}), stored, "/m", LAPTOP)
    assert int8.replica(1, 0, blueprint.expert_map).expert_dtype == int8.engine.expert_dtype == "int8"
    local = ClusterConfig(model="m", lane="local")
    assert draw_blueprint(local, stored, "/m", LAPTOP).wanted == Wanted(1, (0,))


@pytest.mark.parametrize(
    ("dtype", "device", "found"), [("float32", "cpu", "set dtype bfloat16"), ("bfloat16", "cuda", "replica_device cpu")]
)
def test_int8_experts_where_they_cannot_be_computed_are_refused(dtype: str, device: str, found: str) -> None:
    with pytest.raises(ConfigError, match=f"expert_dtype='int8'.*{found}"):
        check_expert_dtype(ClusterConfig(model="m", expert_dtype="int8"), dtype, device)
    check_expert_dtype(ClusterConfig(model="m"), dtype, device)


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_samples_of_processes_merge_as_the_table_says() -> None:
    a, b = Metrics(), Metrics()
    for metrics, usage in ((a, 0.2), (b, 0.7)):
        metrics.inc("prompt_tokens_total", 3)
        metrics.observe("step_seconds", 0.03)
        metrics.set("kv_cache_usage_ratio", usage)
        metrics.set("num_requests_running", 2)
    text = exposition(merge([a.samples(), b.samples()])).decode()
    assert "outcrop_prompt_tokens_total 6.0" in text
    assert "outcrop_step_seconds_count 2.0" in text
    assert 'outcrop_step_seconds_bucket{le="0.05"} 2.0' in text
    assert "outcrop_kv_cache_usage_ratio 0.7" in text
    assert "outcrop_num_requests_running 4.0" in text


def test_every_metric_of_the_table_is_exposed_with_its_type() -> None:
    families = {f.name: f for f in text_string_to_metric_families(exposition(Metrics().samples()).decode())}
    for definition in TABLE:
        assert families[PREFIX + definition.name.removesuffix("_total")].type == definition.kind
        assert definition.name.endswith("_total") == (definition.kind == "counter")


def test_known_label_values_start_at_0_so_that_rates_see_the_first_event() -> None:
    assert ("outcrop_failovers_total", (("reason", "timeout"),), 0.0) in Metrics().samples()


def test_a_process_that_is_gone_leaves_its_counters_but_not_its_gauges() -> None:
    metrics = Metrics()
    metrics.inc("prompt_tokens_total", 3)
    metrics.set("num_requests_running", 2)
    left = {name for name, _, value in cumulative(metrics.samples()) if value}
    assert left == {"outcrop_prompt_tokens_total"}


def test_ingresses_that_are_gone_leave_their_counters_and_no_more() -> None:
    now = [0.0]
    exposition = Exposition(Metrics(), lambda: now[0])
    for number in range(100):
        ingress = Metrics()
        ingress.inc("prompt_tokens_total", 3)
        ingress.set("num_requests_running", 2)
        exposition.hear(f"ingress-{number}", ingress.samples())
        now[0] += INGRESS_GONE_S
    assert len(exposition._ingress) == 2
    text = exposition.text(None, None).decode()
    assert "outcrop_prompt_tokens_total 300.0" in text
    assert "outcrop_num_requests_running 4.0" in text


def test_settings_are_plain_json() -> None:
    assert json.loads(ClusterConfig(model="m").model_dump_json())["model"] == "m"
