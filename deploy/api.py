"""The HTTP routes. Bodies are checked by deploy/openai, work is done by Service; here is only HTTP."""

import hmac
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray.exceptions import TaskCancelledError
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from deploy.front_client import Overloaded, Unavailable
from deploy.generation import Generation, GenerationFailed
from deploy.openai import errors
from deploy.openai.choices import ChoiceDelta
from deploy.openai.errors import APIError
from deploy.openai.parsing import parse_body
from deploy.openai.requests import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from deploy.openai.responses import SSE_DONE, ChatResponder, CompletionResponder, Usage, dump, sse
from deploy.openai.sampling import check_token_ids
from deploy.service import Service

logger = logging.getLogger(__name__)

MIB = 2**20
PING_S = 15
CLIENT_CLOSED_REQUEST = 499  # nginx's number; HTTP has none


def create_api(service: Service) -> FastAPI:
    """The whole application around one Service."""
    app = FastAPI(title="Outcrop", version=version("outcrop"), docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.include_router(open_routes)
    app.include_router(keyed_routes)
    app.add_exception_handler(APIError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(TaskCancelledError, _on_disconnect)
    app.add_exception_handler(Exception, _on_exception)
    return app


def _service(request: Request) -> Service:
    return request.app.state.service  # type: ignore[no-any-return]


def require_key(request: Request) -> None:
    """Compare the bearer key in constant time. Raises APIError (401)."""
    key = _service(request).config.api_key
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if not given or scheme.lower() != "bearer":
        raise errors.unauthorized(is_missing=True)
    # Starlette reads headers as Latin-1; clients send the bytes of their UTF-8.
    if not hmac.compare_digest(given.strip().encode("latin-1"), key.get_secret_value().encode()):
        raise errors.unauthorized()


async def read_body(request: Request) -> bytes:
    """The JSON body, read no further than the limit. Raises APIError (413, 415)."""
    # `curl -d` says it sends a form, and is served. A web page is not: by other types than JSON, any page could make
    # a browser use a server in its reach without asking it first (CORS).
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and "origin" in request.headers:
        raise errors.unsupported_media_type(media_type)
    limit_mib = _service(request).config.max_body_mib
    limit = int(limit_mib * MIB)
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise errors.too_large(limit_mib)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise errors.too_large(limit_mib)
    return bytes(body)


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
    service = _service(request)
    try:
        generation = await service.generate(body)
    except Overloaded:
        service.metrics.inc("requests_failed_total", reason="overloaded")
        raise errors.overloaded() from None
    except Unavailable:
        raise errors.unavailable("No front serves now") from None
    responder = responder_class(body, service.tokenizer, service.config.model_name)
    if body.stream:
        return _EventStream(generation, responder)
    return await _whole(generation, responder)


async def _whole(generation: Generation, responder: CompletionResponder | ChatResponder) -> Response:
    deltas: list[list[ChoiceDelta]] = [[] for _ in generation.choices]
    try:
        async for delta in generation.deltas():
            deltas[delta.index].append(delta)
    except GenerationFailed as error:
        logger.error("request %s failed: %s", responder.id, error)
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
        logger.error("request %s failed in its stream: %s", responder.id, error)
        yield sse(errors.internal(responder.id).body())


@keyed_routes.get("/models")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model_card(_service(request))]}


@keyed_routes.get("/models/{model_id:path}")
async def model(request: Request, model_id: str) -> dict[str, Any]:
    _service(request).check_model(model_id)
    return _model_card(_service(request))


def _model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.config.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "outcrop",
        "root": service.config.model,
        "max_model_len": service.max_model_len,
    }


@keyed_routes.get("/cluster")
async def cluster(request: Request) -> dict[str, Any]:
    state = _service(request).state
    rows = [asdict(actor) for actor in state.actors]
    return {
        "model": _service(request).config.model_name,
        "state": state.state,
        "phase": state.phase,
        "error": state.error,
        "started": state.started,
        "map_version": state.map_version,
        "kv_cache_tokens": state.kv_cache_tokens,
        "fronts": [row for row in rows if row["kind"] == "front"],
        "replicas": [row for row in rows if row["kind"] == "expert"],
    }


@keyed_routes.get("/experts")
async def experts(request: Request) -> dict[str, Any]:
    answer = await _service(request).supervisor.experts()
    if not answer:
        raise errors.unavailable("The expert map is not known yet")
    return answer


@open_routes.post("/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    service, body = _service(request), parse_body(await read_body(request), TokenizeRequest)
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
    service, body = _service(request), parse_body(await read_body(request), DetokenizeRequest)
    service.check_model(body.model)
    check_token_ids(body.tokens, service.model.vocab_size, "tokens")
    return {"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)}


@open_routes.get("/version")
async def show_version() -> dict[str, str]:
    return {"version": version("outcrop")}


@open_routes.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 only when a generation could succeed now."""
    service = _service(request)
    state = service.state
    content: dict[str, Any] = {"state": state.state, "phase": state.phase, "error": state.error}
    if not service.is_ready:
        content |= {"loaded_bytes": state.progress.loaded, "total_bytes": state.progress.total}
    return JSONResponse(content, 200 if service.is_ready else 503)


@open_routes.get("/metrics")
async def metrics(request: Request) -> Response:
    service = _service(request)
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
    return _json_error(errors.internal(request.headers.get("x-request-id", "unknown")))
