"""The Ray Serve application: `deploy.app:build`.

Three deployments: the supervisor, one replica, that owns fronts and expert replicas as Ray actors; the ingress, any
number of replicas, that speaks HTTP; and the gate, which keeps Serve from calling the application RUNNING before it
serves. Deleting the application stops what the supervisor started.
"""

import asyncio
from typing import Any, cast

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.util import list_named_actors

from cluster.config import ClusterConfig, load_config
from cluster.control.ray_actors import RayActors
from cluster.control.supervisor import Supervisor
from cluster.logs import set_up_logs
from cluster.messages.actors import NAMESPACE_PREFIX, Sample, Wanted
from cluster.messages.state import ClusterState, ExpertsReport, RebalanceReport
from cluster.models.hub import resolve_model
from deploy.demo import expand_demo
from deploy.ingress.api import create_api
from deploy.ingress.service import Service
from deploy.ingress.tracing.exporter import check_tracing, open_tracing

Handle = DeploymentHandle[Any]

# Requests are admitted by the engine's own queues, which answer 429; Serve's limits must not come first.
UNLIMITED = 1_000_000
GATE_PERIOD_S = 1.0
PREDECESSOR_PERIOD_S = 0.5


@serve.deployment(
    name="supervisor",
    num_replicas=1,
    max_ongoing_requests=1000,
    graceful_shutdown_timeout_s=30,
    logging_config={"enable_access_log": False},
)
class SupervisorDeployment:
    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]
        settings = ClusterConfig(**config)
        set_up_logs("supervisor", settings.log_format, settings.log_level)
        await _end_of_predecessors()
        namespace = f"{NAMESPACE_PREFIX}{serve.get_replica_context().app_name}"
        self.supervisor = Supervisor(settings, RayActors(namespace))
        self.supervisor.start()

    async def push_samples(self, ingress_id: str, samples: tuple[Sample, ...]) -> ClusterState:
        return self.supervisor.push_samples(ingress_id, samples)

    async def exposition(self, ingress_id: str, samples: tuple[Sample, ...]) -> bytes:
        return await self.supervisor.exposition(ingress_id, samples)

    async def experts(self) -> ExpertsReport | None:
        return await self.supervisor.experts()

    async def state(self) -> ClusterState:
        return self.supervisor.state()

    async def scale(self, fronts: int | None, group: int | None, replicas: int | None) -> Wanted:
        return await self.supervisor.scale(fronts, group, replicas)

    async def rebalance(self, dry_run: bool, force: bool) -> RebalanceReport:
        return await self.supervisor.rebalance(dry_run, force)

    async def __del__(self) -> None:
        # Serve calls this when the replica is stopped on purpose, not when it crashes. Ingresses end at the same time,
        # and answer first what they have accepted.
        try:
            await self.supervisor.finish()
        finally:
            await self.supervisor.stop()


async def _end_of_predecessors() -> None:
    """In an update, Serve starts this replica while the one before still lets fronts finish; then that one ends its
    actors, so they are not for us. A replica that has crashed is gone, and its actors are ours.
    """
    own = serve.get_replica_context().replica_id.to_full_id_str()
    siblings = own.rpartition("#")[0] + "#"
    while any(a["name"].startswith(siblings) and a["name"] != own for a in list_named_actors(all_namespaces=True)):
        await asyncio.sleep(PREDECESSOR_PERIOD_S)


class _Link:
    """SupervisorLink over a Serve handle."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    async def push_samples(self, ingress_id: str, samples: tuple[Sample, ...]) -> ClusterState:
        return await self.handle.push_samples.remote(ingress_id, samples)  # type: ignore[no-any-return]

    async def exposition(self, ingress_id: str, samples: tuple[Sample, ...]) -> bytes:
        return await self.handle.exposition.remote(ingress_id, samples)  # type: ignore[no-any-return]

    async def experts(self) -> ExpertsReport | None:
        return await self.handle.experts.remote()  # type: ignore[no-any-return]

    async def scale(self, fronts: int | None, group: int | None, replicas: int | None) -> Wanted:
        return await self.handle.scale.remote(fronts, group, replicas)  # type: ignore[no-any-return]

    async def rebalance(self, dry_run: bool, force: bool) -> RebalanceReport:
        return await self.handle.rebalance.remote(dry_run, force)  # type: ignore[no-any-return]


@serve.deployment(name="gate", num_replicas=1, graceful_shutdown_timeout_s=5)
class GateDeployment:
    """Does nothing, once the cluster serves.

    Supervisor and ingress are there at once, so that people see the progress of loading. But Serve calls an application
    RUNNING when all constructors have returned, however long they take, and that is when KubeRay moves on to a new
    cluster. So one constructor waits. It takes the supervisor's settings: what replaces that one replaces the gate.
    """

    async def __init__(self, config: dict[str, Any], supervisor: Handle) -> None:  # type: ignore[misc]
        settings = ClusterConfig(**config)
        set_up_logs("gate", settings.log_format, settings.log_level)
        while not await self._is_serving(supervisor):
            await asyncio.sleep(GATE_PERIOD_S)

    async def _is_serving(self, supervisor: Handle) -> bool:
        """Raises RuntimeError, which Serve shows as the reason of DEPLOY_FAILED, if there is nothing to wait for."""
        try:
            state: ClusterState = await supervisor.state.remote()
        except RayActorError:
            return False  # Serve restarts it
        if state.state == "failed":
            raise RuntimeError(state.error or "the cluster could not be brought up")
        return state.is_up


@serve.deployment(
    name="ingress",
    max_ongoing_requests=UNLIMITED,
    graceful_shutdown_timeout_s=60,
    logging_config={"enable_access_log": False},
)
@serve.ingress()
class IngressDeployment:
    async def __init__(  # type: ignore[misc]
        self, config: dict[str, Any], supervisor: Handle, gate: Handle | None = None
    ) -> None:
        """`gate` is there to be deployed: Serve deploys what is bound."""
        settings = ClusterConfig(**config)
        set_up_logs("ingress", settings.log_format, settings.log_level)
        self.tracing = open_tracing(settings)
        self.service = Service(settings, resolve_model(settings.model), _Link(supervisor))
        await self.service.warm_up()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self.service, self.tracing)

    def __del__(self) -> None:  # Serve calls it when the replica is stopped on purpose
        if tracing := getattr(self, "tracing", None):
            tracing.close()


def build(args: dict[str, Any]) -> Application:
    """Builder for Serve: `import_path: deploy.app:build`, `args:` any settings of ClusterConfig.

    OUTCROP_* variables of the process that builds count as well. Raises ConfigError.
    """
    return application(expand_demo(load_config(args)))


def application(config: ClusterConfig, is_gated: bool = True) -> Application:
    """Whoever follows the supervisor's own state needs no gate."""
    check_tracing(config)
    # The secret key travels to the ingress as text; a SecretStr would arrive as asterisks.
    settings = config.model_dump(exclude_unset=True)
    if config.api_key is not None:
        settings["api_key"] = config.api_key.get_secret_value()
    keyless = {k: v for k, v in settings.items() if k != "api_key"}
    placement = {"num_cpus": 0, "resources": config.ingress_resources}
    supervisor = SupervisorDeployment.options(ray_actor_options=placement).bind(keyless)  # type: ignore[attr-defined]
    gate = GateDeployment.options(ray_actor_options=placement).bind(keyless, supervisor)  # type: ignore[attr-defined]
    ingress = IngressDeployment.options(  # type: ignore[attr-defined]
        num_replicas=config.ingress_replicas, ray_actor_options=placement
    )
    return cast("Application", ingress.bind(settings, supervisor, *([gate] if is_gated else [])))
