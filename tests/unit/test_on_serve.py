"""Where an application finds a place in a Ray's Serve; tests/e2e/test_shared_ray.py has a real one."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from cluster.config import ROUTES, ClusterConfig
from cluster.errors import ConfigError
from deploy.cli import on_serve
from deploy.cli.on_serve import address, check_place, wait_for_answer
from deploy.ingress.api import keyed_routes, open_routes
from deploy.ingress.cluster_api import cluster_routes


def config(**settings: Any) -> ClusterConfig:
    return ClusterConfig(model="m", **settings)


def serve_with(port: int = 8000, **routes: str) -> dict[str, Any]:
    """As Serve describes itself."""
    applications = {name: {"route_prefix": prefix} for name, prefix in routes.items()}
    return {"http_options": {"host": "127.0.0.1", "port": port}, "applications": applications}


def test_each_name_has_its_address() -> None:
    assert address(config()) == "http://127.0.0.1:8000"
    assert address(config(name="two", host="::1", port=80)) == "http://[::1]:80/two"


def test_another_name_finds_a_place() -> None:
    check_place(config(), serve_with())
    check_place(config(name="two"), serve_with(outcrop="/", three="/three"))


@pytest.mark.parametrize(
    ("settings", "details", "told"),
    [
        (
            {},
            serve_with(outcrop="/"),
            "name='outcrop': this Ray serves the application 'outcrop' at http://127.0.0.1:8000 ",
        ),
        (
            {},
            serve_with(default="/"),
            "the application 'default' at http://127.0.0.1:8000 already: choose another --name",
        ),
        ({"name": "a"}, serve_with(a="/b"), "name='a': .* at http://127.0.0.1:8000/b already"),
        ({}, serve_with(8210, outcrop="/"), "port=8000: .* choose --host 127.0.0.1 --port 8210 and another --name$"),
        ({}, serve_with(8210, a="/a"), "choose --host 127.0.0.1 --port 8210$"),
        ({}, serve_with(8210), "--port 8210, or stop it \\(`serve shutdown`\\): it has no applications$"),
        ({"host": "0.0.0.0"}, serve_with(a="/a"), "host='0.0.0.0'.* listens on 127.0.0.1:8000"),
    ],
)
def test_a_place_that_is_taken_is_refused(settings: dict[str, Any], details: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_place(config(**settings), details)


def test_no_name_hides_a_route_of_the_application_at_the_root() -> None:
    paths = {route.path for router in (open_routes, keyed_routes, cluster_routes) for route in router.routes}  # type: ignore[attr-defined]
    # A name has no dot.
    assert {path.split("/")[1] for path in paths} - {"", "openapi.json"} == set(ROUTES)


@pytest.fixture
def answers() -> Iterator[tuple[int, list[int]]]:
    """(port, what /one/health answers, one after the other)."""
    statuses: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop(0) if self.path == "/one/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, statuses
        server.shutdown()


def test_an_address_is_told_when_it_has_answered(
    answers: tuple[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, statuses = answers
    statuses += [503, 503, 200]
    assert wait_for_answer(config(name="one", port=port)) is None
    assert not statuses
    monkeypatch.setattr(on_serve, "ANSWER_S", 0.0)
    assert wait_for_answer(config(port=port)) == f"http://127.0.0.1:{port}/health answers 404"


def test_nobody_listens_at_an_address(monkeypatch: pytest.MonkeyPatch, answers: tuple[int, list[int]]) -> None:
    monkeypatch.setattr(on_serve, "ANSWER_S", 0.0)
    found = wait_for_answer(config(host="127.0.0.2", port=answers[0]))
    assert found is not None
    assert found.startswith(f"http://127.0.0.2:{answers[0]}/health does not answer")
