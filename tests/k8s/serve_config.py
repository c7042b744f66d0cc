"""serveConfigV2: a string to the CRD, so checked here as Serve would read it, and by building the application."""

import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from cluster.config import ClusterConfig, load_config
from cluster.errors import ConfigError
from deploy.app import build
from tests.k8s.manifests import Object

IMPORT_PATH = "deploy.app:build"


def parsed(service: Object) -> Object:
    return yaml.safe_load(service["spec"]["serveConfigV2"])  # type: ignore[no-any-return]


def settings(service: Object) -> ClusterConfig:
    """ClusterConfig of the (only) application. Raises ConfigError."""
    (application,) = parsed(service)["applications"]
    return load_config(application["args"], environ={})


def errors(service: Object) -> list[str]:
    """What is wrong with it, one line each."""
    config = parsed(service)
    try:
        checked = ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        return [str(error)]
    wrong = [f"{path} is no key of Serve, which would ignore it" for path in _unknown(config, checked, "serveConfigV2")]
    if config.get("http_options", {}).get("host") != "0.0.0.0":
        wrong.append("http_options.host is not 0.0.0.0: probes and Services would not reach it")
    for application in config["applications"]:
        wrong += _application_errors(application)
    return wrong


def _unknown(given: Any, read: Any, path: str) -> Iterator[str]:
    """Keys that Serve does not know. It ignores them in silence, to be forward-compatible."""
    if isinstance(read, list) and isinstance(given, list):
        for i, (item, model) in enumerate(zip(given, read, strict=True)):
            yield from _unknown(item, model, f"{path}[{i}]")
    if not isinstance(read, BaseModel):
        return
    for key, value in given.items():
        if key not in type(read).model_fields:
            yield f"{path}.{key}"
        else:
            yield from _unknown(value, getattr(read, key), f"{path}.{key}")


def _application_errors(application: Object) -> Iterator[str]:
    if application.get("import_path") != IMPORT_PATH:
        yield f"import_path {application.get('import_path')} is not {IMPORT_PATH}"
    if not application.get("args", {}).get("model"):
        yield "args: model is missing"
        return
    outside = {name: value for name, value in os.environ.items() if not name.startswith("OUTCROP_")}
    try:
        with patch.dict(os.environ, outside, clear=True):
            built = build(application["args"])
    except ConfigError as error:
        yield f"args: {error}"
        return
    names = set(_bound_names(built))
    for deployment in application.get("deployments", ()):
        if deployment["name"] not in names:
            yield f"deployment {deployment['name']} is not in the application, which has {', '.join(sorted(names))}"
        if not deployment.get("ray_actor_options", {}).get("num_cpus"):
            yield f"deployment {deployment['name']}: with num_cpus 0 it may land on the head"
    for name in names - {each["name"] for each in application.get("deployments", ())}:
        yield f"deployment {name} has no entry: with its num_cpus of 0 it may land on the head"


def _bound_names(application: Any) -> Iterator[str]:
    bound = application._bound_deployment
    yield bound.name
    for argument in bound.init_args:
        if hasattr(argument, "_bound_deployment"):
            yield from _bound_names(argument)
