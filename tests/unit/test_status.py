"""`outcrop status` on narrow terminals: what operators copy is whole, what has no room is named."""

import io
import time
from typing import Any

import pytest
from rich.console import Console

from deploy.cli.cluster import _actors

IDS = ("front-0", "expert-g0-r0", "expert-g12-r117")


def row(actor_id: str, **changed: Any) -> dict[str, Any]:
    usual = {"group": None, "state": "recovering", "since": time.time() - 100, "node": "10.0.12.134", "pid": 1234567}
    return {"id": actor_id, "gpu": "", "lane": "object_ref", "tokens": 1234567, "detail": ""} | usual | changed


def shown(width: int, **changed: Any) -> list[str]:
    cluster = {"fronts": [row(IDS[0])], "replicas": [row(IDS[1], group=0), row(IDS[2], group=12, **changed)]}
    output = io.StringIO()
    Console(file=output, width=width).print(_actors(cluster, width))
    return output.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_ids_and_states_are_whole_at_any_width(width: int) -> None:
    lines = shown(width, gpu="NVIDIA H100 80GB HBM3", detail="waits for a node with room for it")
    assert max(map(len, lines)) <= width
    starts = [line.split()[:1] for line in lines]
    assert all([actor_id] in starts for actor_id in IDS)
    assert sum("recovering" in line.split() for line in lines) == len(IDS)


def test_columns_that_find_no_room_are_named() -> None:
    assert shown(80)[-1].strip() == "no room for lane in 80 columns"
    assert "no room" not in "".join(shown(200))


def test_empty_columns_take_no_room() -> None:
    header = shown(200)[0].split()
    assert header == ["id", "group", "state", "for", "node", "pid", "lane", "tokens"]
