"""What a module of families/ provides, and which family a config.json is of."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.errors import ModelError
from cluster.models import families
from cluster.models.files import read_json
from cluster.models.spec import ModelSpec
from cluster.validation import describe

# Our key of a tensor -> the spellings of its name in published checkpoints, the most common first.
Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Family:
    """`parse` turns config.json into a spec and raises ValidationError, which names the field and the value.

    Names of `layer_tensors` follow `layer_prefix`, in which {} is the number of the layer. `expert_forms` are the ways
    in which a layer's experts are stored, the most common first: stacked, as gate_up and down, or each expert by
    itself, as gate, up and down; there {} in the names is the number of the expert. `examples` are Hub ids.
    """

    model_type: str
    architecture: str
    examples: tuple[str, ...]
    parse: Callable[[dict[str, Any]], ModelSpec]
    model_tensors: Names
    layer_tensors: Names
    expert_forms: tuple[Names, ...]
    layer_prefix: str = "model.layers.{}."


@cache
def all_families() -> dict[str, Family]:
    """Model type -> family. Each module of families/ has one, as FAMILY."""
    names = (found.name for found in pkgutil.iter_modules(families.__path__, f"{families.__name__}."))
    modules = map(importlib.import_module, names)
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


def read_spec(model_dir: Path) -> ModelSpec:
    """Read and check `config.json`; `eos_token_id` of generation_config.json wins, as in transformers.

    Raises ModelError.
    """
    raw = read_json(model_dir / "config.json")
    try:
        _family_of(raw.get("model_type"))  # first: other files of a model that is not ours may be anything
    except ModelError as error:
        raise ModelError(f"{model_dir}/config.json: {error}") from None
    generation = model_dir / "generation_config.json"
    if generation.exists() and (eos := read_json(generation).get("eos_token_id")) is not None:
        raw["eos_token_id"] = eos
    try:
        return parse_config(raw)
    except ModelError as error:
        raise ModelError(f"{model_dir}/config.json: {error}") from None


def spec_at(path: Path) -> ModelSpec:
    """Of a directory, or of a config.json by itself. Raises ModelError."""
    if path.is_dir():
        return read_spec(path)
    try:
        return parse_config(read_json(path))
    except ModelError as error:
        raise ModelError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def parse_config(raw: dict[str, Any]) -> ModelSpec:
    """The content of a config.json as a spec. Raises ModelError that names the field."""
    family = _family_of(raw.get("model_type"))
    try:
        return family.parse(raw)
    except ValidationError as error:
        raise ModelError(describe(error)) from None


def _family_of(model_type: Any) -> Family:
    known = all_families()
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    served = ", ".join(f"{name!r} ({f.architecture})" for name, f in known.items())
    raise ModelError(f"model_type={model_type!r:.100} is not served: Outcrop serves {served}, such as {example_ids()}")


def example_ids() -> str:
    """Models of the Hub that are served, for messages."""
    return " or ".join(family.examples[0] for family in all_families().values())
