"""Custom Ray resources: how operators put fronts and expert replicas on different nodes."""

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cluster.config import ClusterConfig, load_config
from cluster.errors import ConfigError
from cluster.messages.actors import Machine
from cluster.policy.resources import plan_resources
from deploy.cli.flags import with_config_flags

NOTHING_YET = Machine(cluster_cpus=4, cluster_gpus=0, largest_node_cpus=4)


def test_environment_and_flags_carry_json() -> None:
    config = load_config({"model": "m"}, environ={"OUTCROP_FRONT_RESOURCES": '{"outcrop_front": 1}'})
    assert config.front_resources == {"outcrop_front": 1}
    seen: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @with_config_flags
    def command(config_file: None, **settings: Any) -> None:
        seen.update(settings)

    result = CliRunner().invoke(app, ["m", "--replica-resources", '{"outcrop_expert": 0.5}'])
    assert result.exit_code == 0, result.output
    assert load_config(seen, environ={}).replica_resources == {"outcrop_expert": 0.5}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("outcrop_front", "is not JSON"),
        ('["outcrop_front"]', "front_resources"),
        ({"GPU": 1}, "set gpus_per_front"),
        ({"outcrop_front": 1.5}, "whole number"),
        ({"outcrop_front": 0}, "whole number"),
    ],
)
def test_what_ray_would_refuse_later_is_refused_with_the_setting(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"model": "m", "front_resources": value}, environ={})


def test_actors_with_custom_resources_wait_for_gpus_that_are_not_there_yet() -> None:
    settings: dict[str, Any] = {"model": "m", "device": "cuda"}
    with pytest.raises(ConfigError, match="needs 3 GPUs"):
        plan_resources(ClusterConfig(**settings), NOTHING_YET)
    wanted = {"outcrop_expert": 1.0}
    plan = plan_resources(ClusterConfig(**settings, replica_resources=wanted), NOTHING_YET)
    assert (plan.front_device, plan.replica_device, plan.gpus_per_replica) == ("cuda", "cuda", 1)
    assert plan.replica_resources == wanted
    assert plan.front_resources == {}
