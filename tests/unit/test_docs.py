"""The documents name what the code has, and nothing else."""

import re
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.metrics import PREFIX, TABLE
from deploy.ingress.api import keyed_routes, open_routes
from deploy.ingress.cluster_api import cluster_routes
from deploy.ingress.openai.requests import ChatCompletionRequest, CompletionRequest

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs/reference.md").read_text()
API = (ROOT / "docs/api.md").read_text()
README = (ROOT / "README.md").read_text()


def test_the_reference_lists_every_setting_as_it_is() -> None:
    for name, field in ClusterConfig.model_fields.items():
        default = "required" if field.is_required() else "-" if field.default is None else field.default
        assert f"| `{name}` | {default} | {field.description} |" in REFERENCE


def test_the_reference_lists_every_metric_as_it_is_and_no_other() -> None:
    for metric in TABLE:
        row = f"| `{PREFIX}{metric.name}` | {metric.kind} | {', '.join(metric.labels) or '-'} | {metric.help} |"
        assert row in REFERENCE
    named = set(re.findall(rf"`{PREFIX}(\w+)`", REFERENCE + API + README))
    assert named == {metric.name for metric in TABLE}


@pytest.mark.parametrize("text", [API, README], ids=["docs/api.md", "README.md"])
def test_every_route_is_documented(text: str) -> None:
    paths = {route.path for router in (open_routes, keyed_routes, cluster_routes) for route in router.routes}  # type: ignore[attr-defined]
    named = set(re.findall(r"`(?:[A-Z]+ )?(/[^`\s]*)`", text))
    assert {path.replace("{model_id:path}", "{id}") for path in paths} <= named


@pytest.mark.parametrize("model", [CompletionRequest, ChatCompletionRequest])
def test_every_request_field_is_documented(model: type[CompletionRequest] | type[ChatCompletionRequest]) -> None:
    for name in set(model.model_fields) - {"best_of"}:
        assert f"`{name}" in API or f"`stream`, `{name}" in API, name


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*.md"))], ids=lambda p: p.name)
def test_files_that_documents_name_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"(?:tests|actors|cluster|deploy|benchmarks|docs|k8s)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
