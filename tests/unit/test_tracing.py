"""From the outputs of fronts to spans: an in-memory exporter, no Ray."""

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from cluster.config import ClusterConfig, load_config
from cluster.errors import ConfigError
from cluster.messages.requests import GenerationRequest, RequestOutput, SamplingParams, Timing
from deploy.ingress.fronts.output_stream import OutputStream
from deploy.ingress.openai.choices import Choice
from deploy.ingress.openai.parsing import parse_body
from deploy.ingress.openai.requests import CompletionRequest
from deploy.ingress.request_id import RequestId
from deploy.ingress.text.tokens import Tokenizer
from deploy.ingress.tracing.exporter import open_tracing
from deploy.ingress.tracing.request_trace import RequestTrace
from deploy.ingress.tracing.spans import TraceRequests, Tracing
from tests import tiny_tokenizers
from tests.checkpoints import MODELS, write_checkpoint
from tests.engines import make_engine

PARAMS = SamplingParams(max_tokens=4, temperature=0.5)
PATH = "/v1/completions"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MS = 1_000_000


def output(*, queued: float | None = None, seconds: float = 0.002, failovers: int = 0) -> RequestOutput:
    return RequestOutput("r-0", (1,), timing=Timing(seconds, 1, 0.001, 0.0005, failovers, 3, queued))


def stream(front: str, offered: float) -> OutputStream:
    found = OutputStream(GenerationRequest("r-0", "ingress", (1, 2), PARAMS))
    found.front, found.offered = front, offered
    return found


def fill(trace: RequestTrace) -> None:
    """A request of one choice that a second front takes over after two tokens."""
    request = parse_body(b'{"prompt": "Hi"}', CompletionRequest)
    tokenizer = Tokenizer(tiny_tokenizers.byte_level())
    trace.tokenised(trace.started)
    trace.begin(1, [Choice(0, request, PARAMS, (1, 2), tokenizer)], PARAMS)
    first, second = stream("front-0", trace.started + 0.001), stream("front-1", trace.started + 0.1)
    outputs = [(first, output(queued=0.003)), (first, output()), (second, output(queued=0.001, failovers=1))]
    for each, found in [*outputs, (second, output()), (second, output())]:
        trace.observe(0, each, found)
        trace.choices[0].feed(found)


class Traced:
    """An application around `work`, its client, and the spans it has ended."""

    def __init__(self, work: Callable[[RequestTrace | None], None]) -> None:
        self.exporter = InMemorySpanExporter()
        self.seen: list[RequestTrace | None] = []
        app = FastAPI()

        async def answer(request: Request) -> str:
            self.seen.append(getattr(request.state, "trace", None))
            work(self.seen[-1])
            return "done"

        app.add_api_route(PATH, answer, methods=["POST"])
        app.add_api_route("/tokenize", answer, methods=["POST"])
        app.add_middleware(TraceRequests, tracing=Tracing(SimpleSpanProcessor(self.exporter), "demo"))
        app.add_middleware(RequestId)
        self.transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def post(self, path: str = PATH, **headers: str) -> list[ReadableSpan]:
        async with httpx.AsyncClient(transport=self.transport, base_url="http://test") as client:
            await client.post(path, headers={"X-Request-Id": "r"} | headers)
        return list(self.exporter.get_finished_spans())


async def test_a_request_is_one_trace_and_its_stages_are_children() -> None:
    *children, root = await Traced(lambda trace: fill(trace) if trace else None).post(traceparent=CALLER)
    assert (root.name, root.context.trace_id, root.parent.span_id) == (  # type: ignore[union-attr]
        "llm_request",
        int(CALLER.split("-")[1], 16),
        int(CALLER.split("-")[2], 16),
    )
    assert [child.name for child in children] == ["tokenise", *["queue", "prefill", "decode"] * 2]
    assert {child.parent.span_id for child in children} == {root.context.span_id}  # type: ignore[union-attr]
    assert {child.context.trace_id for child in children} == {root.context.trace_id}
    attributes = dict(root.attributes or {})
    assert attributes.pop("gen_ai.latency.time_in_queue") == pytest.approx(0.003)
    assert attributes.pop("gen_ai.latency.time_in_model_prefill") == pytest.approx(0.002)
    assert attributes.pop("gen_ai.latency.time_in_model_decode") == pytest.approx(0.004)
    first = attributes.pop("gen_ai.latency.time_to_first_token")
    assert 0 < first < attributes.pop("gen_ai.latency.e2e")  # type: ignore[operator]
    assert attributes == {
        "http.request.method": "POST", "url.path": PATH, "http.response.status_code": 200,
        "gen_ai.request.id": "r", "gen_ai.response.model": "demo", "gen_ai.request.n": 1,
        "gen_ai.request.max_tokens": 4, "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 1.0,
        "gen_ai.usage.prompt_tokens": 2, "gen_ai.usage.completion_tokens": 5,
        "gen_ai.response.finish_reasons": ("abort",),
    }  # fmt: skip


async def test_stages_lie_end_to_end_and_add_up_what_their_steps_cost() -> None:
    *children, root = await Traced(lambda trace: fill(trace) if trace else None).post()
    assert root.parent is None
    stages = {}
    for front in ("front-0", "front-1"):
        mine = [child for child in children if (child.attributes or {}).get("outcrop.front") == front]
        assert all(a.end_time == b.start_time for a, b in pairwise(mine))
        stages[front] = mine
        assert mine[0].start_time > root.start_time  # type: ignore[operator]
    lengths = [(s.end_time - s.start_time) / MS for s in (*stages["front-0"], *stages["front-1"])]  # type: ignore[operator]
    assert lengths == pytest.approx([3, 2, 2, 1, 2, 4], abs=0.001)
    assert "outcrop.num_steps" not in (stages["front-1"][0].attributes or {}), "a queue has no steps"
    assert dict(stages["front-1"][1].attributes or {})["outcrop.num_failovers"] == 1
    decode = dict(stages["front-1"][2].attributes or {})
    assert decode.pop("outcrop.expert_wait_seconds") == pytest.approx(0.002)
    assert decode.pop("outcrop.expert_compute_seconds") == pytest.approx(0.001)
    assert decode == {
        "outcrop.choice": 0, "outcrop.front": "front-1", "outcrop.num_steps": 2, "outcrop.num_failovers": 0,
        "outcrop.num_local_tokens": 6,
    }  # fmt: skip


async def test_an_error_is_an_error_and_a_refusal_has_no_usage() -> None:
    def fail(trace: RequestTrace | None) -> None:
        raise RuntimeError("broken")

    (root,) = await Traced(fail).post()
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "RuntimeError: broken")
    assert "gen_ai.usage.prompt_tokens" not in (root.attributes or {})


async def test_what_a_front_could_not_finish_is_an_error_though_its_stream_had_begun() -> None:
    def break_off(trace: RequestTrace | None) -> None:
        assert trace
        trace.observe(0, stream("front-0", trace.started), output(queued=0.0))
        error = RequestOutput("r-0", finish_reason="error", error="out of memory")
        trace.observe(0, stream("front-0", trace.started), error)

    root = (await Traced(break_off).post())[-1]
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "out of memory")


@pytest.mark.parametrize("request_", [(PATH, CALLER[:-1] + "0"), ("/tokenize", CALLER)])
async def test_what_is_not_sampled_or_generates_nothing_is_not_recorded(request_: tuple[str, str]) -> None:
    app = Traced(lambda trace: None)
    assert await app.post(request_[0], traceparent=request_[1]) == []
    assert app.seen == [None]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MODELS["granite"], tmp_path_factory.mktemp("granite"))


def timings(model_dir: Path, is_traced: bool, budget: int) -> list[Timing | None]:
    engine = make_engine(model_dir, budget=budget)
    engine.add(GenerationRequest("a", "test", tuple(range(20)), SamplingParams(max_tokens=4), is_traced=is_traced))
    found: list[Timing | None] = []
    while engine.has_work:
        found += [output.timing for output in engine.step()]
    return found


def test_outputs_of_a_traced_request_carry_what_its_steps_have_taken(model_dir: Path) -> None:
    first, *others = (t for t in timings(model_dir, is_traced=True, budget=8) if t)
    assert first.num_steps == 3, "20 tokens of prompt by 8"
    assert first.queue_seconds is not None
    assert [t.num_steps for t in others] == [1] * 3
    assert {t.queue_seconds for t in others} == {None}
    for timing in (first, *others):
        assert 0 < timing.expert_compute_seconds <= timing.expert_wait_seconds < timing.seconds


def test_outputs_of_others_carry_nothing(model_dir: Path) -> None:
    assert timings(model_dir, is_traced=False, budget=8) == [None] * 4


ENDPOINT = "http://127.0.0.1:4318/v1/traces"


@pytest.fixture
def without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deploy.ingress.tracing.spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("without_opentelemetry")
def test_without_the_packages_the_start_fails_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"otlp_traces_endpoint=.*4318.*pip install 'outcrop\[otel\]'"):
        open_tracing(ClusterConfig(model="demo", otlp_traces_endpoint=ENDPOINT))


@pytest.mark.usefixtures("without_opentelemetry")
def test_without_an_endpoint_nothing_is_needed_and_nothing_imported() -> None:
    assert open_tracing(ClusterConfig(model="demo")) is None
    assert "deploy.ingress.tracing.spans" not in sys.modules


def test_the_check_at_start_imports_no_ray() -> None:
    """Ray reads its environment when it is imported, and `outcrop serve` sets that after the check."""
    config = f"ClusterConfig(model='demo', otlp_traces_endpoint={ENDPOINT!r})"
    code = "import deploy.cli.server, deploy.cli.check as c, sys"
    code += f"; c.check_tracing(c.{config}); sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_endpoint_is_a_url() -> None:
    with pytest.raises(ConfigError, match=r"otlp_traces_endpoint='localhost:4317'.*http://HOST:4318/v1/traces"):
        load_config({"model": "demo", "otlp_traces_endpoint": "localhost:4317"}, environ={})
