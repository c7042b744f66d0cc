"""`outcrop probe`: what a kind of node can do, as a hardware profile for `outcrop plan`."""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from cluster.errors import ConfigError
from cluster.planning.hardware import VERSION, HardwareProfile, HttpSpeed
from cluster.validation import describe
from deploy.cli.http import console, fail
from deploy.cli.probe_http import measure_http
from deploy.demo import MODEL_DIR


def probe(
    name: Annotated[str | None, typer.Option(help="Name of the profile; default: the machine's.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: NAME.json.")] = None,
    threads: Annotated[int | None, typer.Option(help="Cores that actors may use; default: all.", min=1)] = None,
    cost_per_hour: Annotated[float | None, typer.Option(help="Price of a node.", min=0.0)] = None,
    ray_address: Annotated[
        str | None, typer.Option("--ray", help="Address of a Ray cluster: measure a node of each kind in it.")
    ] = None,
) -> None:
    """Measure this machine for `outcrop plan`: memory, products, attention, experts, lanes, HTTP. Half a minute, in
    which nothing else should run. GPUs are not measured: their profiles come from data sheets.
    """
    prefix = _slug(name or platform.node())
    try:
        with console.status("serving the demo model, for HTTP"):
            http = measure_http()
        with console.status("computing"):
            nodes = measure_nodes(ray_address, threads) if ray_address else {"": measured(threads)}
        for node, figures in nodes.items():
            kind = f"{prefix}-{node}" if node else prefix
            profile = profile_of(kind, figures, http, cost_per_hour)
            file = out if out and len(nodes) == 1 else Path(f"{kind}.json")
            file.write_text(json.dumps(profile.model_dump(exclude_none=True), indent=1) + "\n")
            console.print(f"{file}: {told(profile)}", soft_wrap=True)
    except (ConfigError, OSError) as error:
        raise fail(str(error)) from None


def measured(threads: int | None) -> dict[str, Any]:
    """What actors measure, in a process of their own. Raises ConfigError."""
    command = [sys.executable, "-m", "actors.probe", str(MODEL_DIR), *([str(threads)] if threads else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"the probe failed: {done.stderr.strip().rpartition(chr(10))[2]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure_nodes(address: str, threads: int | None) -> dict[str, dict[str, Any]]:
    """By a name of the kind: one node of each number of CPUs and GPUs in a Ray. Raises ConfigError."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from deploy.cli.local_ray import ray_cluster

    with ray_cluster(address):
        kinds: dict[str, str] = {}
        for node in ray.nodes():
            if node["Alive"] and (cpus := node["Resources"].get("CPU", 0)):
                kinds.setdefault(f"{cpus:g}-cpus-{node['Resources'].get('GPU', 0):g}-gpus", node["NodeID"])
        task = ray.remote(num_cpus=0)(measured)
        # One after the other: nodes of a test may share a machine.
        return {
            kind: ray.get(
                task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(threads)
            )
            for kind, node in kinds.items()
        }


def profile_of(name: str, figures: dict[str, Any], http: HttpSpeed, cost_per_hour: float | None) -> HardwareProfile:
    """Raises ConfigError."""
    known = {"version": VERSION, "name": name, "source": "measured", "cost_per_hour": cost_per_hour}
    try:
        return HardwareProfile.model_validate(_rounded(known | figures | {"http": http.model_dump()}))
    except ValidationError as error:
        raise ConfigError(describe(error, HardwareProfile.model_fields)) from None


def told(profile: HardwareProfile) -> str:
    return (
        f"reads {profile.read_gb_per_second:.1f} GB/s, multiplies {profile.product_tflops:.2f} TFLOP/s, "
        f"unix {profile.lanes['unix'].round_trip_us:.0f} us, zmq {profile.lanes['zmq'].round_trip_us:.0f} us, "
        f"HTTP {profile.http.token_us:.0f} us of CPU a token"
    )


def _rounded(value: Any) -> Any:
    """Four digits: a profile is for people, too."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "node"
