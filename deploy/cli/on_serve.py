"""Where `outcrop serve` finds a place for its application in a Ray that may serve others: never one that is taken.

Serve has one address for all applications of a Ray, which can't change while it runs.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from cluster.config import DEFAULT_NAME, ClusterConfig
from cluster.errors import ConfigError

POLL_S = 0.2
ANSWER_S = 30.0
TURN = "outcrop-serve"


def route(config: ClusterConfig) -> str:
    return "/" if config.name == DEFAULT_NAME else f"/{config.name}"


def address(config: ClusterConfig) -> str:
    return _url(config.host, config.port, route(config))


def _url(host: str, port: int, prefix: str) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{prefix.rstrip('/')}"


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
            turn: Any = ray.remote(num_cpus=0)(Turn).options(name=TURN, namespace=TURN).remote()
            break
        except (ActorAlreadyExistsError, AssertionError):
            # The latter from Ray: who has the turn is ending, its class is gone already, its actor is not.
            time.sleep(POLL_S)
    try:
        yield
    finally:
        ray.kill(turn)


def check_place(config: ClusterConfig, serve_details: dict[str, Any]) -> None:
    """Raises ConfigError if Serve listens elsewhere, or if another application has the name or the route."""
    host, port = serve_details["http_options"]["host"], serve_details["http_options"]["port"]
    routes = {name: application["route_prefix"] for name, application in serve_details["applications"].items()}
    holders = [name for name, prefix in routes.items() if name == config.name or prefix == route(config)]
    if (host, port) != (config.host, config.port):
        other = " and another --name" if holders else ""
        stop = "" if routes else ", or stop it (`serve shutdown`): it has no applications"
        raise ConfigError(
            f"host={config.host!r}, port={config.port}: Serve of this Ray listens on {host}:{port}, for all of its "
            f"applications: choose --host {host} --port {port}{other}{stop}"
        )
    if holders:
        at = _url(host, port, routes[holders[0]] or "")
        raise ConfigError(
            f"name={config.name!r}: this Ray serves the application {holders[0]!r} at {at} already: "
            "choose another --name, which is served at /NAME"
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
