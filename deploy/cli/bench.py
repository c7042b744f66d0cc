"""`outcrop bench`: load on a running server, and its throughput and latencies."""

import asyncio
import json
import random
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deploy.cli.http import DEFAULT_URL, Key, Url, call, connect, console, fail
from deploy.cli.load_test import Results, percentile, stream_all

TEXT = (
    "Experts are groups of weights; a router sends each token to a few of them, and their answers are added up. 0 1 2"
)
PERCENTILES = (0.5, 0.95, 0.99)


def bench(
    requests: Annotated[int, typer.Option(help="Requests in all.", min=1)] = 32,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 8,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 64,
    output_len: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Measure a running server: random prompts of one length, greedy streams of one length."""
    with connect(url, api_key) as client:
        longest = call(client, "/v1/models")["data"][0]["max_model_len"]
        if input_len + output_len > longest:
            raise fail(
                f"--input-len={input_len} and --output-len={output_len} are more than the model's {longest} tokens"
            )
        known = sorted(set(call(client, "/tokenize", {"prompt": TEXT, "add_special_tokens": False})["tokens"]))
        headers = dict(client.headers)
    dice = random.Random(seed)
    prompts = [dice.choices(known, k=input_len) for _ in range(requests)]
    with console.status(f"{requests} requests, {concurrency} at a time"):
        asyncio.run(stream_all(url, prompts[:1], 2, headers=headers))  # a first request costs more
        results = asyncio.run(stream_all(url, prompts, output_len, concurrency, headers))
    figures = _figures(results)
    _show(results, figures)
    if json_file:
        settings = {"requests": requests, "concurrency": concurrency, "input_len": input_len, "output_len": output_len}
        json_file.write_text(json.dumps({"settings": settings, **figures}, indent=1) + "\n")
    if results.errors:
        raise fail(f"{len(results.errors)} of {requests} requests failed, the first with: {results.errors[0]}")


def _figures(results: Results) -> dict[str, object]:
    times = {"ttft": results.first, "inter_token": results.between, "request": results.whole}
    return {
        "seconds": results.seconds,
        "failed": len(results.errors),
        "output_tokens": results.num_tokens,
        "output_tokens_per_second": results.num_tokens / results.seconds,
        "requests_per_second": len(results.whole) / results.seconds,
        "milliseconds": {
            name: {f"p{100 * share:.0f}": 1000 * percentile(values, share) for share in PERCENTILES}
            for name, values in times.items()
            if values
        },
    }


def _show(results: Results, figures: dict[str, object]) -> None:
    console.print(
        f"{len(results.whole)} requests in {results.seconds:.1f} s, {len(results.errors)} failed: "
        f"{figures['output_tokens_per_second']:.1f} tokens/s, {figures['requests_per_second']:.2f} requests/s"
    )
    table = Table("milliseconds", *(f"p{100 * share:.0f}" for share in PERCENTILES))
    rows = (("time to first token", results.first), ("between tokens", results.between), ("request", results.whole))
    for name, values in rows:
        table.add_row(name, *(f"{1000 * percentile(values, share):,.1f}" for share in PERCENTILES))
    console.print(table)
