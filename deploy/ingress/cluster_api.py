"""The routes of operators: what the cluster is, which experts are busy, scale, rebalance."""

import asyncio
import re
from collections.abc import Awaitable
from dataclasses import asdict, fields
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import Field, PlainValidator, model_validator
from ray.exceptions import RayActorError

from cluster.config import ClusterConfig
from cluster.errors import NotRunning
from cluster.messages.actors import Wanted
from cluster.messages.state import ActorInfo
from deploy.ingress.http import read_body, read_request, require_key, service_of
from deploy.ingress.openai import errors
from deploy.ingress.openai.fields import refuse
from deploy.ingress.openai.strict import Strict
from deploy.ingress.service import REFRESH_TIMEOUT_S, Service

T = TypeVar("T")
# Answers that may have a thousand rows, or a number for each expert of each layer, are plain JSON already: FastAPI
# would look at each number.
ROW = tuple(field.name for field in fields(ActorInfo))
cluster_routes = APIRouter(prefix="/v1", dependencies=[Depends(require_key)])


def _as_group(value: Any) -> int | None:
    """A group's number; None stands for all of them."""
    if value in ("all", None):
        return None
    if type(value) is not int:
        raise ValueError('must be a number or "all"')
    return value


class ScaleRequest(Strict):
    """How many replicas a group, or each group, and how many fronts there should be."""

    group: Annotated[int | None, PlainValidator(_as_group)] = None
    replicas: int | None = Field(None, ge=1)
    fronts: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _says_something(self) -> "ScaleRequest":
        if self.replicas is None and (self.fronts is None or self.group is not None):
            raise refuse("replicas", "replicas is required (or fronts): how many there should be", "missing")
        return self


class RebalanceRequest(Strict):
    dry_run: bool = False
    force: bool = False


@cluster_routes.get("/cluster")
async def cluster(request: Request) -> JSONResponse:
    service = service_of(request)
    await service.refresh()
    state = service.state
    rows = [{name: getattr(actor, name) for name in ROW} for actor in state.actors]
    return JSONResponse(
        {
            "model": service.config.model_name,
            "state": state.state,
            "phase": state.phase,
            "error": state.error,
            "started": state.started,
            "map_version": state.map_version,
            "kv_cache_tokens": state.kv_cache_tokens,
            "wanted": asdict(state.wanted) if state.wanted else None,
            "fronts": [row for row in rows if row["kind"] == "front"],
            "replicas": [row for row in rows if row["kind"] == "expert"],
        }
    )


@cluster_routes.get("/experts")
async def experts(request: Request) -> JSONResponse:
    report = await seen(service_of(request).supervisor.experts())
    if report is None:
        raise errors.unavailable("The expert map is not known yet")
    shown = _chosen_layers(request, len(report.placement))
    answer = {
        "layers": len(report.placement),
        "experts": len(report.placement[0]),
        "counts": report.counts[shown],
        "recent_counts": report.recent_counts[shown],
        "window_seconds": report.window_seconds,
        "balancedness": report.balancedness,
        "map_version": report.map_version,
        "placement": report.placement[shown],
    }
    return JSONResponse(answer | ({"first_layer": shown.start} if shown.start is not None else {}))


def _chosen_layers(request: Request, number: int) -> slice:
    """Of a large model some may be asked for: layers=0-9. Raises APIError (400)."""
    asked = request.query_params.get("layers")
    if asked is None:
        return slice(None)
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", asked)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < number:
        raise errors.invalid_request(
            f"layers={asked!r} is not there: write one of 0 to {number - 1}, or several, such as 0-{number - 1}",
            "layers",
        )
    return slice(first, last + 1)


@cluster_routes.post("/cluster/scale")
async def scale(request: Request) -> dict[str, Any]:
    """Answers at once with the numbers that there will be; GET /v1/cluster shows how far it is."""
    service, body = service_of(request), await read_request(request, ScaleRequest)
    _check_scale(body, service.config)
    _check_running(service)
    wanted: Wanted = await answer_of(service.supervisor.scale(body.fronts, body.group, body.replicas))
    return {"wanted": asdict(wanted)}


@cluster_routes.post("/cluster/rebalance")
async def rebalance(request: Request) -> dict[str, Any]:
    """Answers when it is done, or why nothing was to do."""
    service, raw = service_of(request), await read_body(request)
    body = await service.work.parse(raw if raw.strip() else b"{}", RebalanceRequest)
    if service.config.lane == "local":
        raise errors.invalid_request("lane='local' has all experts in the front: there is nothing to rebalance")
    _check_running(service)
    asked = service.supervisor.rebalance(body.dry_run, body.force)
    report = await (seen(asked) if body.dry_run else answer_of(asked))
    if report.error:
        raise errors.conflict(report.error)
    return {
        "dry_run": report.is_dry_run,
        "changed": bool(report.layers) and not report.is_dry_run,
        "reason": report.reason,
        "balancedness": {"before": report.balancedness_before, "after": report.balancedness_after},
        "layers": report.layers,
        "experts_moved": report.experts_moved,
        "bytes_to_move": report.bytes_to_move,
        "map_version": report.map_version,
        "seconds": report.seconds,
    }


async def seen(asked: Awaitable[T]) -> T:
    """answer_of() for who only looks. Raises APIError (503) if the supervisor hangs, too."""
    try:
        async with asyncio.timeout(REFRESH_TIMEOUT_S):
            return await answer_of(asked)
    except TimeoutError:
        raise errors.unavailable(f"The supervisor has not answered within {REFRESH_TIMEOUT_S:g} s: ask again") from None


async def answer_of(asked: Awaitable[T]) -> T:
    """The supervisor's answer. Raises APIError (503) if it dies over it: another one takes over within seconds."""
    try:
        return await asked
    except NotRunning as error:  # from Ray, with the supervisor's own exception as its cause
        raise errors.unavailable(f"{getattr(error, 'cause', error)}: ask again") from None
    except RayActorError:
        raise errors.unavailable("The supervisor was lost and is being restarted: ask again") from None


def _check_scale(body: ScaleRequest, config: ClusterConfig) -> None:
    """Raises APIError (400) that names the setting which would allow it."""
    if body.replicas is not None and config.lane == "local":
        raise errors.invalid_request("lane='local' has no expert replicas: scale fronts", "replicas")
    if body.group is not None and not 0 <= body.group < config.groups:
        last = config.groups - 1
        raise errors.invalid_request(f'group={body.group} is not there: choose 0 to {last}, or "all"', "group")
    _check_limits("replicas", body.replicas, config.min_replicas, max(config.max_replicas, config.replicas))
    _check_limits("fronts", body.fronts, config.min_fronts, max(config.max_fronts, config.fronts))


def _check_limits(name: str, number: int | None, least: int, most: int) -> None:
    if number is not None and not least <= number <= most:
        setting = f"{'min' if number < least else 'max'}_{name}"
        raise errors.invalid_request(f"{name}={number} is outside {least} to {most}: see the setting {setting}", name)


def _check_running(service: Service) -> None:
    if not service.state.is_serving:
        raise errors.unavailable(f"The cluster is {service.state.state}: {service.state.phase}")
