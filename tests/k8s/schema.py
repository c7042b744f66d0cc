"""Each object against its schema, made strict: a key that the API server would drop in silence is an error here.

Custom resources: openAPIV3Schema of the CRDs of KubeRay and prometheus-operator. Core kinds: kubernetes-validate, which
carries Kubernetes' own schemas. Both see pod templates: the CRD embeds the pod's schema.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.k8s.manifests import ROOT, Object, pod_templates

CRDS = Path(os.environ.get("OUTCROP_CRDS", ROOT.parent / "shared" / "crds"))
MISSING_CRDS = (
    f"no CRDs at {CRDS}: put those of KubeRay v1.7.0 (ray-operator/config/crd/bases) and prometheus-operator v0.93.0 "
    "(example/prometheus-operator-crd) there, or say in OUTCROP_CRDS where they are"
)
needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason=MISSING_CRDS)
KUBERNETES = "1.33"
CUSTOM_GROUPS = ("ray.io", "monitoring.coreos.com")
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": STRINGS,
        "annotations": STRINGS,
    },
    "required": ["name"],
    "additionalProperties": False,
}


def errors(found: Object) -> list[str]:
    """What is wrong with an object, one line each."""
    if found["apiVersion"].partition("/")[0] not in CUSTOM_GROUPS:
        return list(_core_errors(found))
    schema = _strict_schema(found["apiVersion"], found["kind"])
    if schema is None:
        return [f"{found['apiVersion']} {found['kind']} is in no CRD under {CRDS}"]
    filled = _with_defaults(schema, found)
    wrong = [f"{e.json_path}: {e.message[:300]}" for e in Draft202012Validator(schema).iter_errors(filled)]
    wrong += _doubles(schema, filled, "$")
    for where, template in pod_templates(found):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"} | template["metadata"]}
        wrong += [f"{where}: {error}" for error in _core_errors(pod | {"spec": template["spec"]})]
    return wrong


def _core_errors(found: Object) -> Iterator[str]:
    try:
        kubernetes_validate.validate(found, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{error.json_path}: {error.message[:300]}"
    except kubernetes_validate.SchemaNotFoundError:
        yield f"Kubernetes {KUBERNETES} has no {found['kind']} in {found['apiVersion']}"


@cache
def _strict_schema(api_version: str, kind: str) -> Object | None:
    group, _, version = api_version.partition("/")
    for file in sorted(CRDS.glob(f"{group}_*.yaml")):
        spec = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]
        if spec["names"]["kind"] == kind:
            (schema,) = (v["schema"]["openAPIV3Schema"] for v in spec["versions"] if v["name"] == version)
            strict = _strict(schema)
            strict["properties"]["metadata"] = METADATA
            strict["required"] = ["apiVersion", "kind", "metadata", "spec"]
            return strict
    return None


def _strict(schema: Any) -> Any:
    """Unknown keys are errors, unless the schema says that it takes them."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items() if key not in ("properties", "nullable", "format")}
    if "properties" in schema:
        strict["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    if schema.get("nullable") is True:
        return {"anyOf": [strict, {"type": "null"}]}
    return strict


def _with_defaults(schema: Any, value: Any) -> Any:
    """As the API server does before it checks: keys that are required may have defaults."""
    if isinstance(value, list):
        return [_with_defaults(schema.get("items", {}), each) for each in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties", {})
    defaults = {key: each["default"] for key, each in known.items() if key not in value and "default" in each}
    return defaults | {key: _with_defaults(known.get(key, {}), each) for key, each in value.items()}


def _doubles(schema: Any, value: Any, path: str) -> list[str]:
    """Lists that are maps (environment variables, ports): the API server refuses a key that comes twice."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        return [wrong for key, each in value.items() for wrong in _doubles(known.get(key, {}), each, f"{path}.{key}")]
    if not isinstance(value, list):
        return []
    items = schema.get("items", {})
    wrong = [each for i, item in enumerate(value) for each in _doubles(items, item, f"{path}[{i}]")]
    names = schema.get("x-kubernetes-list-map-keys", ())
    keys = [tuple(item.get(name) for name in names) for item in value] if names else []
    return wrong + [f"{path}: {key} comes twice" for key in {key for key in keys if keys.count(key) > 1}]
