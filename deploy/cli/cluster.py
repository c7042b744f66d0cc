"""`outcrop status | scale | rebalance`: what operators see and do."""

import time
from typing import Annotated, Any

import httpx
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from deploy.cli.http import DEFAULT_URL, Key, Url, call, connect, console, fail

COLOURS = {"ready": "green", "degraded": "yellow", "recovering": "yellow", "failed": "red", "dead": "red"}
COLUMNS = ("id", "group", "state", "for", "node", "pid", "gpu", "lane", "tokens", "detail")
GIVING_WAY = ("lane", "tokens", "gpu", "group", "pid", "for", "node", "detail")  # where there is no room for all
POLL_S = 0.5
MIB = 2**20


def status(
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay, and show changes as they come.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks with --watch.", min=0.1)] = 1.0,
) -> None:
    """Show fronts, expert replicas and the load of experts."""
    with connect(url, api_key) as client:
        if not watch:
            console.print(_overview(client))
            return
        try:
            with Live(_overview(client), console=console, auto_refresh=False) as live:
                while True:
                    time.sleep(every)
                    live.update(_overview(client), refresh=True)
        except KeyboardInterrupt:
            return


def _overview(client: httpx.Client) -> Group:
    cluster = call(client, "/v1/cluster")
    state = Text(cluster["state"], COLOURS.get(cluster["state"], "cyan"))
    phase = "" if cluster["phase"] == cluster["state"] else f" ({cluster['phase']})"
    head = Text.assemble(f"{cluster['model']}: ", state, f"{phase}, map version {cluster['map_version']}")
    parts: list[Any] = [head, _actors(cluster, console.width)]
    if cluster["map_version"]:
        experts = call(client, "/v1/experts")
        parts.append(Text(f"balancedness {experts['balancedness']:.3f} (mean/max load over groups)"))
    return Group(*parts)


def _actors(cluster: dict[str, Any], width: int) -> Group:
    """A table of that width. Ids are whole, for they are copied; columns that find no room are named below it."""
    rows = [_cells(row) for row in cluster["fronts"] + cluster["replicas"]]
    columns = [name for name in COLUMNS if any(row[name] for row in rows)]
    left_out: list[str] = []
    for name in GIVING_WAY:
        if _least_width(_table(columns, rows)) <= width:
            break
        if name in columns:
            columns.remove(name)
            left_out.append(name)
    told = [Text(f"no room for {', '.join(left_out)} in {width} columns", "dim")] if left_out else []
    return Group(_table(columns, rows), *told)


def _table(columns: list[str], rows: list[dict[str, str | Text]]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name not in ("gpu", "detail"))
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    return table


def _least_width(table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=1000), table).minimum


def _cells(row: dict[str, Any]) -> dict[str, str | Text]:
    return {
        "id": row["id"],
        "group": "-" if row["group"] is None else str(row["group"]),
        "state": Text(row["state"], COLOURS.get(row["state"], "cyan")),
        "for": _duration(time.time() - row["since"]),
        "node": row["node"],
        "pid": str(row["pid"] or ""),
        "gpu": row["gpu"],
        "lane": row["lane"],
        "tokens": f"{row['tokens']:,}",
        "detail": row["detail"],
    }


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


def scale(
    group: Annotated[str, typer.Option(help="Number of an expert group, or `all`.")] = "all",
    replicas: Annotated[int | None, typer.Option(help="Expert replicas that the group should have.")] = None,
    fronts: Annotated[int | None, typer.Option(help="Fronts that there should be.")] = None,
    wait: Annotated[bool, typer.Option(help="Return when all are ready and the others have left.")] = True,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Change the number of replicas of a group, or of fronts, without a failed request."""
    if replicas is None and fronts is None:
        raise fail("--replicas or --fronts is missing: how many should there be?")
    body: dict[str, Any] = {} if fronts is None else {"fronts": fronts}
    if replicas is not None:
        body |= {"group": int(group) if group.isdecimal() else group, "replicas": replicas}
    with connect(url, api_key) as client:
        wanted = call(client, "/v1/cluster/scale", body)["wanted"]
        console.print(f"fronts {wanted['fronts']}, replicas by group {wanted['replicas']}")
        if wait:
            started = time.monotonic()
            _wait_for(client, wanted)
            console.print(f"ready after {time.monotonic() - started:.1f} s")


def _wait_for(client: httpx.Client, wanted: dict[str, Any]) -> None:
    """Until exactly what is wanted is there, showing what is still on its way."""
    with console.status("waiting") as shown:
        while True:
            cluster = call(client, "/v1/cluster")
            if cluster["wanted"] != wanted:
                raise fail(f"somebody else has scaled meanwhile, to {cluster['wanted']}")
            rows = cluster["fronts"] + cluster["replicas"]
            pending = [f"{row['id']} {row['state']}" for row in rows if row["state"] != "ready"]
            if not pending and len(rows) == wanted["fronts"] + sum(wanted["replicas"]):
                return
            shown.update(", ".join(pending) or "waiting")
            time.sleep(POLL_S)


def rebalance(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Take every improvement, even above the threshold.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Move experts between groups so that recent load is even."""
    with connect(url, api_key) as client:
        report = call(client, "/v1/cluster/rebalance", {"dry_run": dry_run, "force": force})
    balance, size = report["balancedness"], report["bytes_to_move"] / MIB
    if report["reason"]:
        console.print(f"nothing to do: {report['reason']} (balancedness {balance['before']:.3f})")
        return
    done = "would move" if dry_run else "moved"
    console.print(
        f"balancedness {balance['before']:.3f} -> {balance['after']:.3f}: {done} {report['experts_moved']} experts in "
        f"{report['layers']} layers, {size:,.1f} MiB"
    )
    if not dry_run:
        console.print(f"expert map version {report['map_version']}, {report['seconds']:.1f} s")
