"""Model specs, checkpoints that are only described, and ways to compute, for tests that make their own tensors."""

from pathlib import Path
from typing import Any

import torch

from actors.compute import Compute
from cluster.models.checkpoint import Checkpoint
from cluster.models.family import parse_config
from cluster.models.spec import ModelSpec

CPU = torch.device("cpu")
PLAIN = Compute(CPU, torch.float32)
PLAIN_BFLOAT16 = Compute(CPU, torch.bfloat16)


def spec_of(raw: dict[str, Any]) -> ModelSpec:
    """Of the content of a config.json."""
    return parse_config({"model_type": "granitemoe"} | raw)


def described(spec: ModelSpec, dtype: str = "bfloat16") -> Checkpoint:
    """A checkpoint in which nothing is stored."""
    return Checkpoint(Path("/m"), spec, {}, dtype, 1, spec.num_expert_layers * spec.num_experts)
