"""`outcrop serve | chat | status | scale | rebalance | bench | check | plan | probe | simulate`."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from cluster.config import ClusterConfig, load_config
from cluster.errors import ConfigError, ModelError
from deploy.cli.bench import bench
from deploy.cli.cluster import rebalance, scale, status
from deploy.cli.flags import with_config_flags
from deploy.cli.http import DEFAULT_URL, Key, Url, connect, console, fail, message_of
from deploy.cli.plan import plan
from deploy.cli.probe import probe
from deploy.cli.simulate import simulate
from deploy.demo import expand_demo

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)


def _load(config_file: Path | None, settings: dict[str, Any]) -> ClusterConfig:
    if settings.get("model") is None and not config_file and "OUTCROP_MODEL" not in os.environ:
        raise ConfigError("model is missing: name a directory in Hugging Face layout, a Hub id, or `demo`")
    return expand_demo(load_config(settings, config_file))


@app.command()
@with_config_flags
def serve(config_file: Path | None, **settings: Any) -> None:
    """Serve MODEL over HTTP. Starts a local Ray if none is reachable, and stops on Ctrl-C what it has started."""
    from deploy.cli.server import StartError, serve_model

    try:
        serve_model(_load(config_file, settings))
    except (ConfigError, ModelError, StartError) as error:
        raise fail(str(error)) from None


@app.command()
@with_config_flags
def check(
    config_file: Path | None,
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="MODEL is a config.json, or has one: say what it would take, no more.")
    ] = False,
    **settings: Any,
) -> None:
    """Check MODEL and settings as `serve` does, without starting anything."""
    from deploy.cli.check import check_everything, kernels_here, map_line, sizes_lines

    try:
        config = _load(config_file, settings)
        if dry_run:
            path, lines = Path(config.model), list(sizes_lines(config, Path(config.model)))
        else:
            found = check_everything(config)
            path = found.checkpoint.directory
            size = f"{found.checkpoint.total_bytes / 2**20:,.1f} MiB, {found.checkpoint.dtype}"
            lines = [f"{config.model_name}: {size}; {map_line(config, found)}"]
        is_on_gpus = {config.device_of("front"), config.device_of("expert")} == {"cuda"}
        lines += [] if is_on_gpus else [kernels_here(config, path)]
    except (ConfigError, ModelError) as error:
        raise fail(str(error)) from None
    for line in lines:
        console.print(line)


@app.command()
def chat(
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    quick: Annotated[str | None, typer.Option(help="Ask one question and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
) -> None:
    """Chat with a running server. An empty line or Ctrl-D ends it."""
    messages = [{"role": "system", "content": system}] if system else []
    with connect(url, api_key) as client:
        while question := quick or _ask():
            messages.append({"role": "user", "content": question})
            answer = ""
            for text in _stream_chat(client, messages):
                answer += text
                console.out(text, end="")
            console.print()
            messages.append({"role": "assistant", "content": answer})
            if quick:
                break


def _ask() -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _stream_chat(client: httpx.Client, messages: list[dict[str, str]]) -> Iterator[str]:
    body = {"messages": messages, "stream": True, "temperature": 0}
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise fail(message_of(response.read()))
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise fail(event["error"]["message"])
                    yield from (choice["delta"].get("content") or "" for choice in event["choices"])
    except httpx.HTTPError as error:
        raise fail(f"{client.base_url} does not answer: {error}") from None


for command in (status, scale, rebalance, bench, plan, probe, simulate):
    app.command()(command)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
