"""What is checked before anything is started: all errors in settings and checkpoint that can be found without Ray."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.errors import ConfigError, ModelError
from cluster.models.checkpoint import Checkpoint
from cluster.models.family import spec_at
from cluster.models.hub import resolve_model
from cluster.models.sizes import Sizes
from cluster.models.spec import ModelSpec
from cluster.policy.blueprint import (
    GIB,
    check_config,
    check_expert_dtype,
    device_of_experts,
    max_model_len,
    served_dtype,
)
from deploy.ingress.sandbox import Sandbox
from deploy.ingress.text.chat_template import ChatTemplate
from deploy.ingress.text.tokens import Tokenizer
from deploy.ingress.tracing.exporter import check_tracing


@dataclass(frozen=True, slots=True)
class Check:
    """What is known of a model before anything is started."""

    checkpoint: Checkpoint
    has_chat_template: bool


def check_everything(config: ClusterConfig) -> Check:
    """All errors that can be found without Ray. Raises ConfigError or ModelError."""
    check_tracing(config)
    model_dir = resolve_model(config.model)
    checkpoint = Checkpoint.open(model_dir)
    spec = checkpoint.spec
    check_config(config, spec)
    device = device_of_experts(config)
    check_expert_dtype(config, served_dtype(config, checkpoint), "cuda" if device == "cuda" else "cpu")
    tokenizer = Tokenizer.load(model_dir, config.chat_template)
    if not tokenizer.has_chat_template and config.chat_template != "none":
        raise ModelError(
            f"{model_dir} has no chat template: give one with --chat-template FILE, or serve completions only with "
            "--chat-template none (base models such as PowerMoE-3b have none)"
        )
    if tokenizer.vocab_size > spec.vocab_size:
        raise ModelError(
            f"{model_dir}/tokenizer.json has {tokenizer.vocab_size} tokens, config.json vocab_size={spec.vocab_size}: "
            "tokenizer and weights are of different models"
        )
    if tokenizer.template:
        asyncio.run(_check_template(tokenizer.template))
    return Check(checkpoint, tokenizer.has_chat_template)


async def _check_template(template: ChatTemplate) -> None:
    """Raises ModelError if it can't be compiled."""
    sandbox = Sandbox("compiling the chat template", template.arguments())
    try:
        await sandbox.warm_up()
    finally:
        await sandbox.close()


def kernels_here(config: ClusterConfig, model: Path) -> str:
    """What computes the model at this path. In a process of its own: the command line neither loads torch nor knows
    actors. Raises ConfigError.
    """
    command = [sys.executable, "-m", "actors.compute", config.kernels, config.expert_dtype, str(model)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise ConfigError(found.stderr.strip().rpartition("\n")[2])
    return found.stdout.strip()


def map_line(config: ClusterConfig, check: Check) -> str:
    return _map_line(config, check.checkpoint.spec, check.checkpoint.expert_bytes)


def sizes_lines(config: ClusterConfig, path: Path) -> Iterator[str]:
    """What a model would take, from its config.json alone. Raises ConfigError or ModelError."""
    spec = spec_at(path)
    check_config(config, spec)
    dtype = config.dtype if config.dtype != "auto" else "float32" if spec.dtype == "float32" else "bfloat16"
    sizes, longest = Sizes.of(spec, dtype), max_model_len(config, spec)
    yield (
        f"weights: {(sizes.front + sizes.experts) / GIB:,.2f} GiB in {dtype}: {sizes.front / GIB:,.2f} GiB in each "
        f"front, {sizes.experts / GIB:,.2f} GiB of experts"
    )
    yield _map_line(config, spec, sizes.experts)
    whole = longest * sizes.kv_per_token / GIB
    yield f"KV cache: {sizes.kv_per_token / 2**10:,.1f} KiB for each token, {whole:,.2f} GiB for {longest:,} of them"


def _map_line(config: ClusterConfig, spec: ModelSpec, expert_bytes: int) -> str:
    experts = f"experts: {spec.num_experts} x {spec.num_expert_layers} layers"
    if config.lane == "local":
        return f"{experts} in the front process"
    size = expert_bytes / config.groups / 2**20
    shown = f"{size:,.1f} MiB" if size < 10_000 else f"{size / 2**10:,.1f} GiB"
    return (
        f"{experts} over {config.groups} groups x {config.replicas} replicas, "
        f"{spec.num_experts // config.groups} per group, {shown} per replica"
    )
