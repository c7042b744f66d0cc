"""Traces over OTLP/HTTP: a span for each generation request, and one for each stage of it. Needs the extra `otel`.

Span and attribute names are those of vLLM and of OpenTelemetry's conventions where they have one. The SDK's own OTEL_*
variables work: headers, sampling, batching, resource attributes.
"""

import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ingress.openai.responses import Usage
from deploy.ingress.tracing.request_trace import Attributes, RequestTrace

PATHS = ("/v1/completions", "/v1/chat/completions")


class Tracing:
    """Makes spans and sends them in the background; what can't be sent is dropped, with a line in the log."""

    def __init__(self, processor: SpanProcessor, model: str) -> None:
        resource = Resource.create({SERVICE_NAME: "outcrop"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("outcrop")
        self._model = model

    @classmethod
    def to(cls, endpoint: str, model: str) -> "Tracing":
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint)), model)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def start(self, headers: Headers, method: str, path: str, trace: RequestTrace) -> Span:
        """Part of the trace that a `traceparent` header names, if that is sampled."""
        return self._tracer.start_span(
            "llm_request",
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            {"http.request.method": method, "url.path": path},
            start_time=trace.started_ns,
        )

    def end(self, span: Span, trace: RequestTrace, request_id: str, status: int | None) -> None:
        """`status` is None if no answer was begun, because the client has gone."""
        now, context = time.monotonic(), set_span_in_context(span)
        for stage in trace.stages:
            started = trace.wall_ns(stage.started)
            child = self._tracer.start_span(stage.name, context, attributes=stage.attributes, start_time=started)
            child.end(trace.wall_ns(stage.ended))
        span.set_attributes({"gen_ai.request.id": request_id, "gen_ai.response.model": self._model})
        span.set_attributes(_request(trace) | _latency(trace, now))
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        if trace.error or (status or 0) >= 500:
            span.set_status(StatusCode.ERROR, trace.error)
        span.end(trace.wall_ns(now))


def _request(trace: RequestTrace) -> Attributes:
    if not trace.choices:
        return {}  # refused
    usage = Usage.of(trace.choices, trace.n)
    return {
        "gen_ai.request.n": trace.n,
        "gen_ai.request.max_tokens": trace.params.max_tokens,
        "gen_ai.request.temperature": trace.params.temperature,
        "gen_ai.request.top_p": trace.params.top_p,
        "gen_ai.usage.prompt_tokens": usage.prompt_tokens,
        "gen_ai.usage.completion_tokens": usage.completion_tokens,
        "gen_ai.response.finish_reasons": [choice.finish_reason or "abort" for choice in trace.choices],
    }


def _latency(trace: RequestTrace, ended: float) -> Attributes:
    seconds: Attributes = {"gen_ai.latency.e2e": ended - trace.started}
    if trace.first_token is not None:
        seconds |= {
            "gen_ai.latency.time_to_first_token": trace.first_token - trace.started,
            "gen_ai.latency.time_in_queue": trace.longest("queue"),
            "gen_ai.latency.time_in_model_prefill": trace.longest("prefill"),
            "gen_ai.latency.time_in_model_decode": trace.longest("decode"),
        }
    return seconds


class TraceRequests:
    """ASGI middleware, within RequestId. `request.state.trace` is a RequestTrace where the trace is sampled."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self.app = app
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(PATHS):
            await self.app(scope, receive, send)
            return
        trace = RequestTrace()
        span = self.tracing.start(Headers(scope=scope), scope["method"], scope["path"], trace)
        if not span.is_recording():
            await self.app(scope, receive, send)
            return
        trace.trace_id = format_trace_id(span.get_span_context().trace_id)
        scope["state"]["trace"] = trace
        status: int | None = None

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception as error:
            trace.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.tracing.end(span, trace, scope["state"]["request_id"], status)
