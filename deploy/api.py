"""The HTTP routes. Bodies are checked by deploy/openai, work is done by Service; here is only HTTP."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray.exceptions import TaskCancelledError
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from deploy.cluster_api import cluster_routes
from deploy.front_client import Overloaded, Unavailable
from deploy.generation import Generation, GenerationFailed
from deploy.http import read_body, require_key, service_of
from deploy.openai import errors
from deploy.openai.choices import ChoiceDelta
from deploy.openai.errors import APIError
from deploy.openai.parsing import parse_body
from deploy.openai.requests import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from deploy.openai.responses import SSE_DONE, ChatResponder, CompletionResponder, Usage, dump, sse
from deploy.openai.sampling import check_token_ids
from deploy.page import HEADERS, PAGE
from deploy.request_id import RequestId
from deploy.service import Service

if TYPE_CHECKING:
    from deploy.tracing import Tracing

logger = logging.getLogger(__name__)

PING_S = 15
CLIENT_CLOSED_REQUEST = 499  # nginx's number; HTTP has none


def create_api(service: Service, tracing: "Tracing | None" = None) -> FastAPI:
    """The whole application around one Service."""
    app = FastAPI(title="Outcrop", version=version("outcrop"), docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    if tracing:
        from deploy.tracing import TraceRequests

        app.add_middleware(TraceRequests, tracing=tracing)
    app.add_middleware(RequestId)  # the outermost
    app.include_router(open_routes)
    app.include_router(keyed_routes)
    app.include_router(cluster_routes)
    app.add_exception_handler(APIError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(TaskCancelledError, _on_disconnect)
    app.add_exception_handler(Exception, _on_exception)
    return app


open_routes = APIRouter()
keyed_routes = APIRouter(prefix="/v1", dependencies=[Depends(require_key)])


@keyed_routes.post("/completions")
async def completions(request: Request) -> Response:
    body = parse_body(await read_body(request), CompletionRequest)
    return await _answer(request, body, CompletionResponder)


@keyed_routes.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    body = parse_body(await read_body(request), ChatCompletionRequest)
    return await _answer(request, body, ChatResponder)


async def _answer(
    request: Request, body: Any, responder_class: Callable[..., CompletionResponder | ChatResponder]
) -> Response:
    service, request_id = service_of(request), request.state.request_id
    try:
        generation = await service.generate(body, request_id, getattr(request.state, "trace", None))
    except Overloaded:
        service.metrics.inc("requests_failed_total", reason="overloaded")
        raise errors.overloaded() from None
    except Unavailable:
        raise errors.unavailable("No front serves now") from None
    responder = responder_class(body, service.tokenizer, service.config.model_name, request_id)
    if body.stream:
        return _EventStream(generation, responder)
    return await _whole(generation, responder)


async def _whole(generation: Generation, responder: CompletionResponder | ChatResponder) -> Response:
    deltas: list[list[ChoiceDelta]] = [[] for _ in generation.choices]
    try:
        async for delta in generation.deltas():
            deltas[delta.index].append(delta)
    except GenerationFailed as error:
        logger.error("request failed: %s", error, extra={"request_id": responder.request_id})
        raise errors.internal(responder.id) from None
    finally:
        generation.close()
    usage = Usage.of(generation.choices, responder.request.n)
    return Response(dump(responder.response(deltas, usage)), media_type="application/json")


class _EventStream(EventSourceResponse):
    """Server-sent events of one generation. When the client goes away, the generation is closed at once."""

    def __init__(self, generation: Generation, responder: CompletionResponder | ChatResponder) -> None:
        super().__init__(_events(generation, responder), ping=PING_S, sep="\n")
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the iterator's `finally`: a cancellation that comes while an event is being sent would leave that to
        # the garbage collector, and one before the first event would never reach it.
        try:
            with suppress(TaskCancelledError):  # Serve's `receive` may raise it when the client goes away
                await super().__call__(scope, receive, send)
        finally:
            self.generation.close()


async def _events(generation: Generation, responder: CompletionResponder | ChatResponder) -> AsyncIterator[bytes]:
    try:
        async for delta in generation.deltas():
            yield sse(responder.chunk(delta))
        if responder.request.include_usage:
            yield sse(responder.usage_chunk(Usage.of(generation.choices, responder.request.n)))
        yield SSE_DONE
    except GenerationFailed as error:
        logger.error("request failed in its stream: %s", error, extra={"request_id": responder.request_id})
        yield sse(errors.internal(responder.id).body())


@keyed_routes.get("/models")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model_card(service_of(request))]}


@keyed_routes.get("/models/{model_id:path}")
async def model(request: Request, model_id: str) -> dict[str, Any]:
    service_of(request).check_model(model_id)
    return _model_card(service_of(request))


def _model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.config.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "outcrop",
        "root": service.config.model,
        "max_model_len": service.max_model_len,
    }


@open_routes.get("/")
async def page() -> Response:
    return Response(PAGE, media_type="text/html; charset=utf-8", headers=HEADERS)


@open_routes.post("/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    service, body = service_of(request), parse_body(await read_body(request), TokenizeRequest)
    service.check_model(body.model)
    if body.messages is not None:
        text = service.render(body.messages, body.add_generation_prompt, body.continue_final_message)
        tokens = await service.encode(text, bool(body.add_special_tokens))
    else:
        tokens = await service.encode(body.prompt or "", body.add_special_tokens is not False)
    strings = [service.tokenizer.id_to_token(token) for token in tokens] if body.return_token_strs else None
    return {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens, "token_strs": strings}


@open_routes.post("/detokenize")
async def detokenize(request: Request) -> dict[str, str]:
    service, body = service_of(request), parse_body(await read_body(request), DetokenizeRequest)
    service.check_model(body.model)
    check_token_ids(body.tokens, service.model.vocab_size, "tokens")
    return {"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)}


@open_routes.get("/version")
async def show_version() -> dict[str, str]:
    return {"version": version("outcrop")}


@open_routes.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 only when a generation could succeed now."""
    service = service_of(request)
    state = service.state
    content: dict[str, Any] = {"state": state.state, "phase": state.phase, "error": state.error}
    if not service.is_ready:
        content |= {"loaded_bytes": state.progress.loaded, "total_bytes": state.progress.total}
    return JSONResponse(content, 200 if service.is_ready else 503)


@open_routes.get("/metrics")
async def metrics(request: Request) -> Response:
    service = service_of(request)
    text = await service.supervisor.exposition(service.ingress_id, service.metrics.samples())
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _json_error(error: APIError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return _json_error(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "").split(", ")
        return _json_error(errors.method_not_allowed(method, path, allowed))
    if error.status_code == 404:
        return _json_error(errors.route_not_found(method, path))
    return _json_error(APIError(error.status_code, str(error.detail)))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)  # for nobody: it left before its answer began


async def _on_exception(request: Request, error: Exception) -> Response:
    logger.exception("unexpected error on %s %s", request.method, request.url.path, exc_info=error)
    return _json_error(errors.internal(request.state.request_id))
