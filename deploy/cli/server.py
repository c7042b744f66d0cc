"""`outcrop serve`: check, start, show progress, wait, stop everything that was started."""

import json
import logging
import shlex
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.messages.state import ClusterState
from deploy.cli.check import Check, check_everything, map_line
from deploy.cli.local_ray import ray_cluster, reachable_address
from deploy.cli.on_serve import address, place, route, wait_for_answer

POLL_S = 0.2

console = Console(stderr=True, highlight=False)


class StartError(RuntimeError):
    """The cluster could not be brought up; the message says why."""


class _Stopped(BaseException):
    """SIGINT or SIGTERM."""


def serve_model(config: ClusterConfig) -> None:
    """Serve until a signal comes. Raises ConfigError, ModelError or StartError; nothing is left running then."""
    with _signals():
        try:
            config = _with_hosts(config)
            check = check_everything(config)
            _run(config, check)
        except BaseException as error:
            if not _is_stop(error):
                raise
            console.print("stopped")


def _with_hosts(config: ClusterConfig) -> ClusterConfig:
    """On loopback only this machine reaches us, and knows no other names for us. Elsewhere there may be any."""
    if config.allowed_hosts is not None or not config.is_on_loopback:
        return config
    return config.model_copy(update={"allowed_hosts": []})


def _is_stop(error: BaseException | None) -> bool:
    """A signal that comes while Ray's compiled code runs comes out of it as the cause of a SystemError."""
    while error is not None and not isinstance(error, _Stopped):
        error = error.__cause__
    return error is not None


def _check_port(config: ClusterConfig) -> None:
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"host={config.host!r}, port={config.port}: {error.strerror}: choose another --port or --host"
            ) from None


def _run(config: ClusterConfig, check: Check) -> None:
    ray_address = reachable_address()
    if ray_address is None:
        _check_port(config)
    console.print(f"starting [bold]{config.model_name}[/]: {map_line(config, check)}")
    started = time.monotonic()
    with ray_cluster(ray_address), _application(config, is_own_ray=ray_address is None) as supervisor:
        state = _follow(supervisor)
        if found := wait_for_answer(config):
            raise StartError(f"{found}: the cluster is ready, but Serve does not listen there on this machine")
        _print_ready(config, check, state, time.monotonic() - started)
        _watch(supervisor)


@contextmanager
def _application(config: ClusterConfig, is_own_ray: bool) -> Iterator[Any]:
    """Deploy the application; yields a handle of the supervisor. Raises ConfigError if another has its place."""
    # Imported late: errors in settings must show in a second, and Ray takes longer than that to import.
    from ray import serve

    from deploy.app import application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    location = "HeadOnly" if is_own_ray else "EveryNode"
    is_ours = False
    try:
        with nullcontext() if is_own_ray else place(config) as serve_is_new:
            if serve_is_new:
                _check_port(config)
            serve.start(
                proxy_location=location,
                http_options={"host": config.host, "port": config.port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            is_ours = True
            serve.run(application(config, is_gated=False), name=config.name, route_prefix=route(config))
        yield serve.get_deployment_handle("supervisor", config.name)
    finally:
        console.print("stopping ...")
        if is_ours and not is_own_ray:  # our own Ray ends as a whole, with everything in it
            serve.delete(config.name)


def _follow(supervisor: Any) -> ClusterState:
    """One progress bar over all actors until the cluster is ready. Raises StartError."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=None)
        while True:
            state: ClusterState = supervisor.state.remote().result(timeout_s=60)
            if state.state == "ready":
                return state
            if state.state == "failed":
                raise StartError(state.error or "the cluster could not be brought up")
            total = state.progress.total or None
            progress.update(bar, description=state.phase, completed=state.progress.loaded, total=total)
            time.sleep(POLL_S)


def _watch(supervisor: Any) -> NoReturn:
    """Tell when the state of the cluster changes, until a signal comes."""
    shown = "ready"
    while True:
        time.sleep(1.0)
        try:
            state: ClusterState = supervisor.state.remote().result(timeout_s=10)
        except Exception as error:
            if _is_stop(error):
                raise
            console.print(f"[yellow]the supervisor does not answer: {type(error).__name__}[/]")
            continue
        if state.state != shown:
            shown = state.state
            console.print(f"cluster is {state.state}: {state.phase}")


def _print_ready(config: ClusterConfig, check: Check, state: ClusterState, seconds: float) -> None:
    url = address(config)
    lanes = ", ".join(sorted({actor.lane for actor in state.actors}))
    full = state.kv_cache_tokens / state.max_model_len
    console.print(f"[bold green]ready[/] in {seconds:.1f} s: [bold]{config.model_name}[/] on [bold]{url}[/]")
    console.print(f"  lane {lanes}, expert map version {state.map_version}, {len(state.actors)} actors")
    console.print(f"  KV cache: {state.kv_cache_tokens:,} tokens, {full:.1f} sequences of {state.max_model_len:,}")
    console.print(f"  try: {example(config, url, check.has_chat_template)}", soft_wrap=True, markup=False)
    if config.api_key is None and not config.is_on_loopback:
        console.print(
            "  [yellow]whoever reaches this port may use it, web pages too: see --api-key, --allowed-hosts[/]"
        )


def example(config: ClusterConfig, url: str, is_chat: bool) -> str:
    """A request that this server answers."""
    question = "What is an expert replica?"
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": question}]} if is_chat else {"prompt": question}
    path = "chat/completions" if is_chat else "completions"
    key = " -H 'Authorization: Bearer KEY'" if config.api_key else ""
    body = json.dumps({"model": config.model_name} | asked)
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} \\\n    -d {shlex.quote(body)}"


@contextmanager
def _signals() -> Iterator[None]:
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    # Once: a second signal must not break off the orderly end. Whoever is in a hurry has SIGKILL.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Stopped
