"""What /openapi.json says: every route with its body, its answer and its errors.

Bodies are the models that check them, so they can't differ. Answers are told here, with the keys that are always there.
"""

from functools import cache
from importlib.metadata import version
from typing import Any, NamedTuple

from pydantic import BaseModel

from deploy.ingress.cluster_api import RebalanceRequest, ScaleRequest
from deploy.ingress.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from deploy.ingress.openai.response_requests import ResponsesRequest

Schema = dict[str, Any]
TEXT, NUMBER, WHOLE, YES = {"type": "string"}, {"type": "number"}, {"type": "integer"}, {"type": "boolean"}
ANY: Schema = {}
JSON, SSE = "application/json", "text/event-stream"


def _object(**keys: Schema) -> Schema:
    return {"type": "object", "properties": keys, "required": [*keys]}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


FUNCTION = _object(name=TEXT, arguments=TEXT)
CALL = _object(id=TEXT, type={"const": "function"}, function=FUNCTION)
REASON = _or_null({"enum": ["stop", "length", "tool_calls", "abort", "error"]})
MESSAGE = _object(role={"const": "assistant"}, content=_or_null(TEXT), refusal={"type": "null"})
MESSAGE["properties"]["tool_calls"] = _list(CALL)
CHOICE = {"index": WHOLE, "logprobs": _or_null({"type": "object"}), "finish_reason": REASON, "stop_reason": ANY}
USAGE = _object(
    prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE, prompt_tokens_details={"type": "object"}
)
HEAD = {"id": TEXT, "created": WHOLE, "model": TEXT}
MODEL = _object(id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT, root=TEXT, max_model_len=WHOLE)
COMPLETION = _object(
    **HEAD, object={"const": "text_completion"}, choices=_list(_object(**CHOICE, text=TEXT)), usage=USAGE
)
CHAT = _object(
    **HEAD, object={"const": "chat.completion"}, choices=_list(_object(**CHOICE, message=MESSAGE)), usage=USAGE
)
RESPONSE = _object(
    id=TEXT,
    object={"const": "response"},
    created_at=WHOLE,
    status={"enum": ["completed", "incomplete"]},
    model=TEXT,
    output=_list(_object(id=TEXT, type={"enum": ["message", "function_call"]}, status=TEXT)),
    incomplete_details=_or_null(_object(reason=TEXT)),
    store={"const": False},
    usage=_object(input_tokens=WHOLE, output_tokens=WHOLE, total_tokens=WHOLE),
)
EMBEDDING = _object(object={"const": "embedding"}, index=WHOLE, embedding={"anyOf": [_list(NUMBER), TEXT]})
EMBEDDINGS = _object(
    object={"const": "list"},
    data=_list(EMBEDDING),
    model=TEXT,
    usage=_object(prompt_tokens=WHOLE, total_tokens=WHOLE),
)
ERROR = _object(error=_object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT)))
STATE = _object(state=TEXT, phase=TEXT)
CLUSTER = _object(
    state=TEXT, phase=TEXT, map_version=WHOLE, kv_cache_tokens=WHOLE, wanted=ANY, fronts=_list(ANY), replicas=_list(ANY)
)
EXPERTS = _object(
    layers=WHOLE, experts=WHOLE, counts=_list(_list(WHOLE)), recent_counts=_list(_list(WHOLE)), window_seconds=NUMBER,
    balancedness=NUMBER, map_version=WHOLE, placement=_list(ANY),
)  # fmt: skip
REBALANCED = _object(
    dry_run=YES, changed=YES, reason=ANY, balancedness=ANY, layers=WHOLE, experts_moved=WHOLE, bytes_to_move=WHOLE,
    map_version=WHOLE, seconds=NUMBER,
)  # fmt: skip


class Told(NamedTuple):
    """`types` are the media types of the answer beside JSON; `others` its other statuses."""

    summary: str
    answer: Schema | None = None
    body: type[BaseModel] | None = None
    is_keyed: bool = True
    types: tuple[str, ...] = (JSON,)
    others: tuple[int, ...] = ()
    query: tuple[tuple[str, str], ...] = ()  # names, and what they may be


GENERATES = (400, 404, 413, 415, 429, 500, 503)
ROUTES: dict[tuple[str, str], Told] = {
    ("POST", "/v1/completions"): Told("Continue texts", COMPLETION, CompletionRequest, True, (JSON, SSE), GENERATES),
    ("POST", "/v1/chat/completions"): Told(
        "Answer a conversation", CHAT, ChatCompletionRequest, True, (JSON, SSE), GENERATES
    ),
    ("POST", "/v1/responses"): Told(
        "Answer a conversation, without a store", RESPONSE, ResponsesRequest, True, (JSON, SSE), GENERATES
    ),
    ("POST", "/v1/embeddings"): Told("Pooled hidden states of texts", EMBEDDINGS, EmbeddingRequest, others=GENERATES),
    ("GET", "/v1/models"): Told("The served model", _object(object={"const": "list"}, data=_list(MODEL))),
    ("GET", "/v1/models/{model_id}"): Told("The served model by its name", MODEL, others=(404,)),
    ("POST", "/tokenize"): Told(
        "Tokens of a text or a conversation",
        _object(count=WHOLE, max_model_len=WHOLE, tokens=_list(WHOLE), token_strs=_or_null(_list(TEXT))),
        TokenizeRequest,
        others=(400, 404, 413, 415),
    ),
    ("POST", "/detokenize"): Told(
        "Text of tokens", _object(prompt=TEXT), DetokenizeRequest, others=(400, 404, 413, 415)
    ),
    ("GET", "/v1/cluster"): Told("Fronts and expert replicas", CLUSTER),
    ("GET", "/v1/experts"): Told(
        "The load of every expert, and where it is", EXPERTS, others=(400, 503), query=(("layers", "such as 0-9"),)
    ),
    ("POST", "/v1/cluster/scale"): Told(
        "Change the numbers of fronts and replicas", _object(wanted=ANY), ScaleRequest, others=(400, 503)
    ),
    ("POST", "/v1/cluster/rebalance"): Told(
        "Move experts to even out their load", REBALANCED, RebalanceRequest, others=(400, 409, 503)
    ),
    ("GET", "/health"): Told("Whether a generation could succeed now", STATE, is_keyed=False, others=(503,)),
    ("GET", "/ready"): Told("Whether requests are taken", STATE, is_keyed=False, others=(503,)),
    ("GET", "/version"): Told("The version of Outcrop", _object(version=TEXT), is_keyed=False),
    ("GET", "/metrics"): Told("Metrics for Prometheus", None, is_keyed=False, types=("text/plain",)),
    ("GET", "/"): Told("The page", None, is_keyed=False, types=("text/html",)),
    ("GET", "/docs"): Told("This description for people", None, is_keyed=False, types=("text/html",)),
    ("GET", "/openapi.json"): Told("This description", ANY, is_keyed=False),
}


@cache
def document() -> Schema:
    """OpenAPI 3.1."""
    schemas: Schema = {"Error": ERROR}
    paths: Schema = {}
    for (method, path), told in ROUTES.items():
        paths.setdefault(path, {})[method.lower()] = _operation(path, told, schemas)
    bearer = {"type": "http", "scheme": "bearer", "description": "Only where the server has an API key."}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Outcrop", "version": version("outcrop")},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": bearer}},
    }


def _operation(path: str, told: Told, schemas: Schema) -> Schema:
    content = {
        kind: {"schema": told.answer if kind == JSON and told.answer is not None else TEXT} for kind in told.types
    }
    answers = {"200": {"description": "The answer", "content": content}}
    error = {"schema": {"$ref": "#/components/schemas/Error"}}
    state = {"schema": told.answer or ANY}
    for status in sorted((*told.others, *((401,) if told.is_keyed else ()))):
        shown = state if told.answer is STATE else error
        answers[str(status)] = {"description": "See docs/api.md, Errors", "content": {JSON: shown}}
    operation: Schema = {"summary": told.summary, "responses": answers}
    if "{" in path:
        operation["parameters"] = [{"name": "model_id", "in": "path", "required": True, "schema": TEXT}]
    if told.query:
        operation["parameters"] = [
            {"name": name, "in": "query", "description": what, "schema": TEXT} for name, what in told.query
        ]
    if told.is_keyed:
        operation["security"] = [{"key": []}, {}]
    if told.body:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": _body(told.body, schemas)}}}
    return operation


def _body(model: type[BaseModel], schemas: Schema) -> Schema:
    found = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= found.pop("$defs", {})
    schemas[model.__name__] = found
    return {"$ref": f"#/components/schemas/{model.__name__}"}
