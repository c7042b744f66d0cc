"""The HTTP routes. Bodies are checked by deploy/ingress/openai, work is done by Service; here is only HTTP.

The file is long because every route of models and generations stands in it.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray.exceptions import TaskCancelledError
from sse_starlette import EventSourceResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from deploy.ingress.cluster_api import cluster_routes, seen
from deploy.ingress.failures import count, handle_failures, unexpected
from deploy.ingress.fronts.client import Overloaded, Unavailable
from deploy.ingress.generation import Generation, GenerationFailed, GenerationGivenUp, GenerationRefused
from deploy.ingress.http import read_request, require_key, service_of
from deploy.ingress.openai import errors
from deploy.ingress.openai.answer_json import Rows, dump
from deploy.ingress.openai.choices import ChoiceDelta
from deploy.ingress.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from deploy.ingress.openai.response_events import ResponsesResponder
from deploy.ingress.openai.response_requests import ResponsesRequest, renamed
from deploy.ingress.openai.responses import ChatResponder, CompletionResponder, Usage
from deploy.ingress.openapi import document
from deploy.ingress.request_id import RequestId
from deploy.ingress.service import Service
from deploy.ingress.web_safety import WebSafety
from deploy.ingress.work import LONG
from deploy.page import HEADERS, PAGE, SAFE_HEADERS, content_security_policy
from deploy.page.reference import reference_page

if TYPE_CHECKING:
    from deploy.ingress.tracing.spans import Tracing

logger = logging.getLogger(__name__)

PING_S = 15
Responder = CompletionResponder | ChatResponder | ResponsesResponder
# Tokens that /tokenize lists, even where the context is shorter: people ask how much too long a text is.
MAX_LISTED = 1_000_000


def create_api(service: Service, tracing: "Tracing | None" = None) -> FastAPI:
    """The whole application around one Service."""
    app = FastAPI(title="Outcrop", version=version("outcrop"), docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    if tracing:
        from deploy.ingress.tracing.spans import TraceRequests

        app.add_middleware(TraceRequests, tracing=tracing)
    if origins := service.config.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    app.add_middleware(
        WebSafety, allowed_hosts=service.config.allowed_hosts, allowed_origins=service.config.allowed_origins
    )
    app.add_middleware(RequestId)  # the outermost
    app.include_router(open_routes)
    app.include_router(keyed_routes)
    app.include_router(cluster_routes)
    handle_failures(app)
    return app


open_routes = APIRouter()
keyed_routes = APIRouter(prefix="/v1", dependencies=[Depends(require_key)])


@keyed_routes.post("/completions")
async def completions(request: Request) -> Response:
    body = await read_request(request, CompletionRequest)
    return await _answer(request, body, CompletionResponder)


@keyed_routes.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    body = await read_request(request, ChatCompletionRequest)
    return await _answer(request, body, ChatResponder)


@keyed_routes.post("/responses")
async def responses(request: Request) -> Response:
    body = await read_request(request, ResponsesRequest)
    chat = await service_of(request).work.run(LONG, body.as_chat)
    with renamed():
        return await _answer(
            request, chat, lambda _, __, model, request_id: ResponsesResponder(body, model, request_id)
        )


@keyed_routes.post("/embeddings")
async def embeddings(request: Request) -> Response:
    service, body = service_of(request), await read_request(request, EmbeddingRequest)
    with _translated():
        try:
            content = await service.embed(body, request.state.request_id)
        except GenerationFailed as error:
            logger.error("request failed: %s", error, extra={"request_id": request.state.request_id})
            raise _error_of(error, request.state.request_id) from None
    return Response(content, media_type="application/json")


@contextmanager
def _translated() -> Iterator[None]:
    """What fronts refuse, as APIError."""
    try:
        yield
    except Overloaded:
        raise errors.overloaded() from None
    except Unavailable:
        raise errors.unavailable("No front serves now") from None


async def _answer(
    request: Request, body: CompletionRequest | ChatCompletionRequest, responder_class: Callable[..., Responder]
) -> Response:
    service, request_id = service_of(request), request.state.request_id
    with _translated():
        generation = await service.generate(body, request_id, getattr(request.state, "trace", None))
    responder = responder_class(body, service.tokenizer, service.config.model_name, request_id)
    if body.stream:
        return _EventStream(service, generation, responder, body.n)
    return await _whole(service, generation, responder, body.n)


async def _whole(service: Service, generation: Generation, responder: Responder, n: int) -> Response:
    deltas: list[list[ChoiceDelta]] = [[] for _ in generation.choices]
    size = 0
    try:
        async for delta in generation.deltas():
            deltas[delta.index].append(delta)
            size += delta.size
    except GenerationFailed as error:
        logger.error("request failed: %s", error, extra={"request_id": responder.request_id})
        raise _error_of(error, responder.id) from None
    finally:
        generation.close()
    usage = Usage.of(generation.choices, n)
    content = await service.work.run(size + responder.echo_size, lambda: dump(responder.response(deltas, usage)))
    return Response(content, media_type="application/json")


class _EventStream(EventSourceResponse):
    """Server-sent events of one generation. When the client goes away, the generation is closed at once."""

    def __init__(self, service: Service, generation: Generation, responder: Responder, n: int) -> None:
        super().__init__(_events(service, generation, responder, n), ping=PING_S, sep="\n")
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the iterator's `finally`: a cancellation that comes while an event is being sent would leave that to
        # the garbage collector, and one before the first event would never reach it.
        try:
            with suppress(TaskCancelledError):  # Serve's `receive` may raise it when the client goes away
                await super().__call__(scope, receive, send)
        finally:
            self.generation.close()


async def _events(service: Service, generation: Generation, responder: Responder, n: int) -> AsyncIterator[bytes]:
    try:
        if opening := await service.work.run(responder.echo_size, responder.opening):
            yield opening
        async for delta in generation.deltas():
            if told := await service.work.run(delta.size, partial(responder.events, delta)):
                yield told
        usage = Usage.of(generation.choices, n)
        yield await service.work.run(responder.echo_size, partial(responder.closing, usage))
    except GenerationFailed as error:
        logger.error("request failed in its stream: %s", error, extra={"request_id": responder.request_id})
        failure = _error_of(error, responder.id)
        count(service, failure)
        yield responder.failure(failure)
    except TaskCancelledError:
        raise
    except Exception as error:
        unexpected(service, f"in the stream of {responder.request_id}", error)
        yield responder.failure(errors.internal(responder.id))


def _error_of(error: GenerationFailed, response_id: str) -> errors.APIError:
    if isinstance(error, GenerationGivenUp):
        return errors.unavailable("The front of this request was lost, and no other one has come in time")
    if isinstance(error, GenerationRefused):
        return errors.invalid_request(f"The answer can't be held to the form that was asked for: {error}")
    return errors.internal(response_id)


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


@open_routes.get("/openapi.json")
async def openapi() -> JSONResponse:
    return JSONResponse(document())


@open_routes.get("/docs")
async def docs() -> Response:
    html = reference_page(document())
    headers = SAFE_HEADERS | {"Content-Security-Policy": content_security_policy(html)}
    return Response(html, media_type="text/html; charset=utf-8", headers=headers)


# Not under /v1, as in vLLM; but what computes is for those who have the key.
@open_routes.post("/tokenize", dependencies=[Depends(require_key)])
async def tokenize(request: Request) -> Response:
    service, body = service_of(request), await read_request(request, TokenizeRequest)
    service.check_model(body.model)
    if body.messages is not None:
        text = await service.work.render(body, body.messages, [tool.shown for tool in body.tools])
        with_special = bool(body.add_special_tokens)
    else:
        text, with_special = body.prompt or "", body.add_special_tokens is not False
    tokens = await service.work.encode(text, with_special, most=max(MAX_LISTED, service.max_model_len))

    def answer() -> bytes:
        strings = Rows(tokens, service.tokenizer.id_to_token) if body.return_token_strs else None
        told = {"count": len(tokens), "max_model_len": service.max_model_len}
        return dump(told | {"tokens": Rows(tokens, int), "token_strs": strings})

    return Response(await service.work.run(len(tokens), answer), media_type="application/json")


@open_routes.post("/detokenize", dependencies=[Depends(require_key)])
async def detokenize(request: Request) -> Response:
    service, body = service_of(request), await read_request(request, DetokenizeRequest)
    service.check_model(body.model)
    text = await service.work.decode(body.tokens)
    return Response(await service.work.run(len(text), lambda: dump({"prompt": text})), media_type="application/json")


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


@open_routes.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 as long as requests are taken here, if only to wait for a front: whether a load balancer should send any."""
    service = service_of(request)
    content = {"state": service.state.state, "phase": service.state.phase}
    return JSONResponse(content, 200 if service.takes_requests else 503)


@open_routes.get("/metrics")
async def metrics(request: Request) -> Response:
    """Closes the connection: a pod that drains waits for those that are open, and Prometheus would keep its own."""
    service = service_of(request)
    text = await seen(service.supervisor.exposition(service.ingress_id, service.metrics.samples()))
    headers = {"Connection": "close"}
    return Response(text, headers=headers, media_type="text/plain; version=0.0.4; charset=utf-8")
