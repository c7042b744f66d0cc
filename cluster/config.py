"""ClusterConfig: the one configuration. The file is long because every setting stands in one table.

The command line, OUTCROP_* variables, a YAML file and Serve's `args` are views of it.
"""

import ipaddress
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from cluster.errors import ConfigError
from cluster.logs import Format, Level
from cluster.messages.actors import ActorKind, ExpertDtype, KernelChoice
from cluster.validation import describe

ENV_PREFIX = "OUTCROP_"
Device = Literal["auto", "cpu", "cuda"]
Lane = Literal["auto", "object_ref", "unix", "zmq", "local"]
DEFAULT_NAME = "outcrop"
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
# An application is served under its name: not where the one at / has its own routes.
ROUTES = ("detokenize", "docs", "health", "metrics", "ready", "tokenize", "v1", "version")
HOST_PATTERN = re.compile(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*")
ORIGIN = re.compile(r"\*|https?://([\w.-]+|\[[\da-f:]+\])(:\d+)?", re.IGNORECASE)
# Ray refuses these names among custom resources.
OWN_SETTING = {
    "CPU": "cpus_per_front or cpus_per_replica",
    "GPU": "gpus_per_front or gpus_per_replica",
    "memory": "the pod's or machine's memory",
    "object_store_memory": "the node's --object-store-memory",
}

logger = logging.getLogger(__name__)


class ClusterConfig(BaseModel):
    """Everything an operator can set. `None` means: Outcrop decides from the model and the machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Directory in Hugging Face layout, Hub id, or `demo`.", min_length=1)
    served_model_name: str | None = Field(None, description="Name in the API; default: MODEL as given.")
    host: str = Field("127.0.0.1", description="Address the HTTP server listens on.")
    port: int = Field(8000, description="Port the HTTP server listens on.", ge=1, le=65535)
    name: str = Field(
        DEFAULT_NAME,
        description="Name of the application in its Ray: outcrop is served at /, others at /NAME (`outcrop serve`).",
    )
    api_key: SecretStr | None = Field(None, description="Key that clients must send as `Authorization: Bearer`.")
    allowed_hosts: list[str] | None = Field(
        None,
        description="Names in `Host` to answer beside addresses and localhost: `a.example,*.b.example`, `*` for all.",
    )
    allowed_origins: list[str] = Field(
        [], description="Other origins whose web pages may use the API: `https://a.example,https://b.example`, or `*`."
    )
    chat_template: str | None = Field(
        None, description="Jinja file that replaces the checkpoint's chat template; `none` serves completions only."
    )

    tool_call_parser: Literal["auto", "hermes", "granite", "none"] = Field(
        "auto",
        description="How the model writes tool calls: hermes (also Qwen3, Granite 4), granite (3); auto: see template.",
    )

    fronts: int = Field(1, description="Front actors (attention, router, KV cache).", ge=1, le=256)
    groups: int = Field(2, description="Expert groups; must divide the number of experts.", ge=1)
    replicas: int = Field(1, description="Expert replicas per group.", ge=1, le=256)
    min_fronts: int = Field(1, description="Fewest fronts that scaling may ask for.", ge=1, le=256)
    max_fronts: int = Field(8, description="Most fronts that scaling may ask for.", ge=1, le=256)
    min_replicas: int = Field(1, description="Fewest expert replicas per group that scaling may ask for.", ge=1, le=256)
    max_replicas: int = Field(8, description="Most expert replicas per group that scaling may ask for.", ge=1, le=256)
    autoscale: bool = Field(False, description="Scale fronts and groups by load, between their limits.")
    drain_timeout_s: float = Field(60.0, description="Time a leaving front has to finish its requests.", ge=0)
    redundant_experts: int = Field(
        0, description="Extra slots per layer, over all groups, for copies of hot experts; a multiple of groups.", ge=0
    )
    rebalance_interval_s: float | None = Field(None, description="Rebalance this often; default: on demand.", gt=0)
    rebalance_threshold: float = Field(0.9, description="Balancedness that needs no rebalance.", ge=0, le=1)
    rebalance_mib_per_s: float | None = Field(
        None,
        description="MiB of experts that a replica loads in a second during a rebalance; default: no bound.",
        gt=0,
    )
    load_window_s: float = Field(300.0, description="Age up to which expert load counts for balance.", gt=0)
    ingress_replicas: int = Field(1, description="HTTP ingress replicas.", ge=1, le=64)
    lane: Lane = Field(
        "auto",
        description="How tokens travel to experts; auto: unix on one host, else zmq, else object_ref.",
    )

    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="Type of weights and activations.")
    expert_dtype: ExpertDtype = Field(
        "auto", description="Type of the experts' weights: as all others (auto), or int8, rounded at load; CPU only."
    )
    device: Device = Field("auto", description="Where fronts and experts compute.")
    front_device: Device | None = Field(None, description="Where fronts compute; default: device.")
    replica_device: Device | None = Field(None, description="Where expert replicas compute; default: device.")
    kernels: KernelChoice = Field("auto", description="What computes bfloat16 on a CPU: see `outcrop check`.")
    cuda_graphs: bool = Field(
        False, description="Replay decode steps of fronts on GPUs as CUDA graphs. Has not run on a GPU yet."
    )
    max_model_len: int | None = Field(None, description="Longest prompt + output, in tokens.", ge=1)
    kv_cache_gib: float | None = Field(
        None, description="KV cache of each front, in GiB; default: a share of the memory that is free.", gt=0
    )
    gpu_memory_utilization: float = Field(0.9, description="Share of a GPU that a front may use.", gt=0, le=1)
    block_size: int | None = Field(None, description="Tokens per KV block; default 16, on GPUs 256.", ge=1, le=4096)
    max_num_batched_tokens: int | None = Field(
        None,
        description="Token budget of one engine step; default: what the machine computes in 0.25 s, at most 512.",
        ge=1,
    )
    max_num_seqs: int = Field(64, description="Sequences that run at once in a front.", ge=1)
    max_num_waiting: int = Field(256, description="Sequences that may wait in a front; beyond it 429.", ge=1)
    enable_prefix_caching: bool = Field(True, description="Reuse KV blocks of equal prompt prefixes.")

    cpus_per_front: float | None = Field(None, description="CPUs Ray reserves for a front.", ge=0)
    cpus_per_replica: float | None = Field(None, description="CPUs Ray reserves for an expert replica.", ge=0)
    gpus_per_front: float | None = Field(None, description="GPUs of a front; default 1 on cuda, else 0.", ge=0)
    gpus_per_replica: float | None = Field(None, description="GPUs of a replica; default 1 on cuda, else 0.", ge=0)
    front_resources: dict[str, float] = Field(
        {}, description="Custom Ray resources of a front, as JSON; fronts wait for nodes that have them."
    )
    replica_resources: dict[str, float] = Field(
        {}, description="Custom Ray resources of a replica, as JSON; replicas wait for nodes that have them."
    )
    ingress_resources: dict[str, float] = Field(
        {}, description="Custom Ray resources of an ingress and of the supervisor, as JSON."
    )
    threads_per_front: int | None = Field(None, description="CPU threads of a front.", ge=1)
    threads_per_replica: int | None = Field(
        None,
        description="CPU threads of an expert replica; default: its share of the cores, twice that in native kernels.",
        ge=1,
    )
    load_timeout_s: float = Field(1800.0, description="Time an actor may take to load.", gt=0)

    log_level: Level = Field("info", description="Least level of Outcrop's own log lines.")
    log_format: Format = Field("text", description="Log lines for people (text) or collectors (json).")

    otlp_traces_endpoint: str | None = Field(
        None, description="URL that traces are sent to by OTLP/HTTP, such as http://localhost:4318/v1/traces."
    )

    max_body_mib: float = Field(8.0, description="Largest request body, in MiB.", gt=0)
    max_choices: int = Field(16, description="Largest `n` times number of prompts.", ge=1)
    max_stop: int = Field(16, description="Most stop strings in a request.", ge=0)
    max_logprobs: int = Field(20, description="Most alternatives reported per token.", ge=0)

    @field_validator("name")
    @classmethod
    def _is_route(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("must be up to 40 lower-case letters, digits and dashes, and begin with a letter")
        if value in ROUTES:
            raise ValueError(f"is a route of the API: choose a name other than {', '.join(ROUTES)}")
        return value

    @field_validator("allowed_hosts", "allowed_origins", mode="before")
    @classmethod
    def _read_list(cls, value: Any) -> Any:
        """Flags and environment variables carry text."""
        return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value

    @field_validator("allowed_hosts")
    @classmethod
    def _are_names(cls, value: list[str] | None) -> list[str] | None:
        if wrong := [host for host in value or () if not HOST_PATTERN.fullmatch(host)]:
            raise ValueError(f"{wrong[0]!r} is no host name: write a.example (no scheme, no port), *.a.example or *")
        return None if value is None else [host.lower() for host in value]

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, value: list[str]) -> list[str]:
        if wrong := [origin for origin in value if not ORIGIN.fullmatch(origin)]:
            raise ValueError(f"{wrong[0]!r} is no origin: write https://a.example or http://a.example:8080, or *")
        return [origin.lower() for origin in value]

    @field_validator("front_resources", "replica_resources", "ingress_resources", mode="before")
    @classmethod
    def _read_resources(cls, value: Any) -> Any:
        """Flags and environment variables carry JSON text."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError('is not JSON: write it like {"outcrop_front": 1}') from None

    @field_validator("front_resources", "replica_resources", "ingress_resources")
    @classmethod
    def _are_custom_resources(cls, value: dict[str, float]) -> dict[str, float]:
        for name, amount in value.items():
            if name in OWN_SETTING:
                raise ValueError(f"{name} is no custom resource: set {OWN_SETTING[name]}")
            if not (0 < amount < 1 or (amount >= 1 and amount.is_integer())):
                raise ValueError(f"{name}={amount:g} must be a share between 0 and 1, or a whole number (Ray's rule)")
        return value

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("is no http:// or https:// URL: collectors take OTLP/HTTP at http://HOST:4318/v1/traces")
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> "ClusterConfig":
        if self.max_num_batched_tokens is not None and self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs={self.max_num_seqs} is more than max_num_batched_tokens={self.max_num_batched_tokens}: "
                "a step computes at least one token of each running sequence"
            )
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}")
        if self.min_fronts > self.max_fronts:
            raise ValueError(f"min_fronts={self.min_fronts} is more than max_fronts={self.max_fronts}")
        if self.redundant_experts % self.groups:
            raise ValueError(
                f"redundant_experts={self.redundant_experts} is no multiple of groups={self.groups}: each group gets "
                "the same number of slots"
            )
        if self.lane == "local" and (self.groups != 1 or self.replicas != 1):
            # One process holds everything: groups and replicas have no meaning there.
            object.__setattr__(self, "groups", 1)
            object.__setattr__(self, "replicas", 1)
        return self

    @property
    def is_on_loopback(self) -> bool:
        """Whether only this machine can reach what listens on `host`."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def device_of(self, kind: ActorKind) -> Device:
        return (self.front_device if kind == "front" else self.replica_device) or self.device

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model


def load_config(
    explicit: Mapping[str, Any], config_file: Path | None = None, environ: Mapping[str, str] = os.environ
) -> ClusterConfig:
    """Merge the views: explicit values (flags, Serve args) win over the environment, that over the YAML file.

    Raises ConfigError.
    """
    merged = _from_yaml(config_file) if config_file else {}
    merged |= _from_environ(environ)
    merged |= {key: value for key, value in explicit.items() if value is not None}
    try:
        return ClusterConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(describe(error, ClusterConfig.model_fields)) from None


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name, value in environ.items():
        key = name.removeprefix(ENV_PREFIX).lower()
        if not name.startswith(ENV_PREFIX) or key == "config":
            continue
        if key == "port" and "://" in value:
            continue  # Kubernetes sets OUTCROP_PORT=tcp://... for a Service that is named "outcrop"
        if key in ClusterConfig.model_fields:
            found[key] = value
        elif key not in ("url", "home"):
            # Not an error: Kubernetes sets OUTCROP_SERVICE_HOST and the like for a Service that is named "outcrop".
            logger.warning("%s is no setting of Outcrop and is ignored", name)
    return found


def _from_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={str(path)!r} can't be read: {error}") from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"config={str(path)!r} must hold a mapping of settings, got {type(content).__name__}")
    return content or {}
