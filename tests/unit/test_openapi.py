"""/openapi.json against the routes that there are, the bodies that are taken, and the answers that are given."""

from typing import Any

import jsonschema
import pytest
from fastapi.routing import APIRoute

from deploy.ingress.api import keyed_routes, open_routes
from deploy.ingress.cluster_api import cluster_routes
from deploy.ingress.openai.requests import ChatCompletionRequest, CompletionRequest
from deploy.ingress.openapi import document
from tests.unit.fake_supervisor import Open
from tests.unit.test_agents_over_http import ASKED, CALLS, FLAT_TOOLS, TOOLS, Say, say  # noqa: F401 - a fixture

DOCUMENT = document()


def found_routes() -> set[tuple[str, str]]:
    routers = (open_routes, keyed_routes, cluster_routes)
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    return {(method.lower(), route.path.replace(":path", "")) for route in routes for method in route.methods}


def test_every_route_is_described_and_no_other() -> None:
    described = {(method, path) for path, operations in DOCUMENT["paths"].items() for method in operations}
    assert described == found_routes()


def schema_of(path: str, method: str = "post", status: str = "200") -> dict[str, Any]:
    answer = DOCUMENT["paths"][path][method]["responses"][status]["content"]["application/json"]["schema"]
    return answer | {"components": DOCUMENT["components"]}


def test_schemas_are_schemas() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert "#/$defs" not in str(DOCUMENT)


def test_bodies_are_what_is_checked() -> None:
    for model in (CompletionRequest, ChatCompletionRequest):
        assert {*DOCUMENT["components"]["schemas"][model.__name__]["properties"]} == {*model.model_fields}


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Hi", "logprobs": None}),
    ("/v1/chat/completions", {"messages": ASKED}),
    ("/v1/chat/completions", {"messages": ASKED, "tools": TOOLS}),
    ("/v1/responses", {"input": "Hi", "tools": FLAT_TOOLS}),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
    ("/tokenize", {"prompt": "Hi", "return_token_strs": True}),
    ("/detokenize", {"tokens": [1, 2]}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_answers_are_as_described(say: Say, path: str, body: dict[str, Any]) -> None:  # noqa: F811
    client, _ = await say(CALLS)
    http: Any = client._client
    asked = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    sent = {key: value for key, value in body.items() if value is not None}
    jsonschema.validate(sent, asked | {"components": DOCUMENT["components"]})
    answer = await http.post(path, json=body)
    assert answer.status_code == 200
    jsonschema.validate(answer.json(), schema_of(path))


async def test_looks_and_errors_are_as_described(open_api: Open) -> None:
    http = await open_api(api_key="k")
    keyed = {"Authorization": "Bearer k"}
    for path in ("/v1/models", "/v1/cluster", "/version", "/health", "/ready"):
        answer = await http.get(path, headers=keyed)
        jsonschema.validate(answer.json(), schema_of(path, "get", str(answer.status_code)))
    refused = await http.post("/v1/embeddings", json={})
    assert refused.status_code == 401
    jsonschema.validate(refused.json(), schema_of("/v1/embeddings", "post", "401"))


async def test_programs_and_people_get_them(open_api: Open) -> None:
    http = await open_api(api_key="k")
    assert (await http.get("/openapi.json")).json() == DOCUMENT
    page = await http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for _, path in found_routes():
        assert f" {path}</code>" in page.text
    assert "<script" not in page.text
