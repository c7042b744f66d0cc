"""Command-line flags of ClusterConfig: one per field, with the field's type, help and environment twin."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from cluster.config import ENV_PREFIX, ClusterConfig

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.", envvar="OUTCROP_CONFIG")]


def with_config_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `command(config_file, **settings)` the flags of every setting, beside those that it names itself;
    MODEL is its argument.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is p.KEYWORD_ONLY]
    parameters = [_parameter("config_file", ConfigFile)]
    for name, field in ClusterConfig.model_fields.items():
        shown = f"{field.description} ({ENV_PREFIX}{name.upper()})"
        if name == "model":
            # Optional on the command line: the YAML file or the environment may name it.
            parameters.insert(0, _parameter(name, Annotated[str | None, typer.Argument(metavar="MODEL", help=shown)]))
        else:
            if field.default not in (None, {}, []):
                shown = f"{shown[:-1]}; default {field.default})"
            parameters.append(_parameter(name, Annotated[_type(field) | None, typer.Option(help=shown)]))
    command.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
    return command


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _type(field: FieldInfo) -> Any:
    """The type of one value on the command line: without None; secrets, lists and mappings (JSON) as text."""
    kind = field.annotation
    if get_origin(kind) is UnionType:
        kind = next(option for option in get_args(kind) if option is not type(None))
    return str if kind is SecretStr or get_origin(kind) in (dict, list) else kind
