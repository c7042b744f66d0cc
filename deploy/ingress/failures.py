"""How requests end with an error: its JSON, our log, and the counter that alerts are made of."""

import logging
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray.exceptions import TaskCancelledError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deploy.ingress.openai import errors
from deploy.ingress.openai.errors import APIError

if TYPE_CHECKING:
    from deploy.ingress.service import Service

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's number; HTTP has none
REASONS = {429: "overloaded", 503: "unavailable"}


def handle_failures(app: FastAPI) -> None:
    app.add_exception_handler(APIError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(TaskCancelledError, _on_disconnect)
    app.add_exception_handler(Exception, _on_exception)


def json_error(error: APIError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    # Not what is only looked at: pages and probes ask again and again while a cluster loads.
    if request.method == "POST":
        count(request.app.state.service, error)
    return json_error(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "").split(", ")
        return json_error(errors.method_not_allowed(method, path, allowed))
    if error.status_code == 404:
        return json_error(errors.route_not_found(method, path))
    return json_error(APIError(error.status_code, str(error.detail)))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)  # for nobody: it left before its answer began


async def _on_exception(request: Request, error: Exception) -> Response:
    unexpected(request.app.state.service, f"on {request.method} {request.url.path}", error)
    return json_error(errors.internal(request.state.request_id))


def unexpected(service: "Service", where: str, error: Exception) -> None:
    """An error of ours: its request fails, and operators must hear of it."""
    logger.exception("unexpected error %s", where, exc_info=error)
    _count(service, "internal")


def count(service: "Service", error: APIError) -> None:
    """What a front could not finish has been counted where it was learnt."""
    if error.status in REASONS:
        _count(service, REASONS[error.status])


def _count(service: "Service", reason: str) -> None:
    service.metrics.inc("requests_failed_total", reason=reason)
