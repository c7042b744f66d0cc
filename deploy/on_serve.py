"""Where `outcrop serve` finds a place for its application in a Ray that may serve others: never one that is taken.

Serve has one address for all applications of a Ray, which can't change while it runs.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from cluster.config import DEFAULT_NAME, ClusterConfig, ConfigError

POLL_S = 0.2
ANSWER_S = 30.0
TURN = "outcrop-serve"


def route(config: ClusterConfig) -> str:
    return "/" if config.name == DEFAULT_NAME else f"/{config.name}"


def address(config: ClusterConfig) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{config.port}{route(config).rstrip('/')}"


@contextmanager
def place(config: ClusterConfig) -> Iterator[bool]:
    """Nobody else takes it while the block runs. Yields True if Serve does not run yet. Raises ConfigError."""
    from ray.serve.context import _get_global_client

    with _turn():
        client = _get_global_client(raise_if_no_controller_running=False)
        if client is not None:
            check_place(config, client.get_serve_details())
        yield client is None


@contextmanager
def _turn() -> Iterator[None]:
    """One start at a time: Serve replaces an application of the same name without a word. Ends with this process."""
    import ray
    from ray.exceptions import ActorAlreadyExistsError

    class Turn:
        pass

    while True:
        try:
            turn = ray.remote(num_cpus=0)(Turn).options(name=TURN, namespace=TURN).remote()
            break
        except ActorAlreadyExistsError:
            time.sleep(POLL_S)
    try:
        yield
    finally:
        ray.kill(turn)


def check_place(config: ClusterConfig, serve_details: dict[str, Any]) -> None:
    """Raises ConfigError if Serve listens elsewhere, or if another application has the name or the route."""
    http, applications = serve_details["http_options"], serve_details["applications"]
    at = config.model_copy(update={"host": http["host"], "port": http["port"]})
    if (at.host, at.port) != (config.host, config.port):
        other = "" if config.name not in applications else " and another --name"
        raise ConfigError(
            f"host={config.host!r}, port={config.port}: Serve of this Ray listens on {at.host}:{at.port}, for all of "
            f"its applications: choose --host {at.host} --port {at.port}{other}"
        )
    taken = {application["route_prefix"]: name for name, application in applications.items()}
    holder = config.name if config.name in applications else taken.get(route(config))
    if holder is not None:
        raise ConfigError(
            f"name={config.name!r}: this Ray serves the application {holder!r} at {address(at)} already: "
            "choose another --name, it will be served at /NAME"
        )


def wait_for_answer(config: ClusterConfig) -> str | None:
    """None when /health answers 200 at the address that users are told, else what was found there instead."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            status = httpx.get(f"{address(config)}/health", timeout=5.0, trust_env=False).status_code
            if status == 200:
                return None
            found = f"answers {status}"
        except httpx.HTTPError as error:
            found = f"does not answer: {error}"
        if time.monotonic() > deadline:
            return f"{address(config)}/health {found}"
        time.sleep(POLL_S)
