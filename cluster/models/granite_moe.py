"""What config.json says about a GraniteMoE model. Knows no torch: every process may read it.

Field names and defaults follow transformers' GraniteMoeConfig. A parameter that changes the model is used or
refused by name; one that only matters in training is accepted and has no effect (see TRAINING_ONLY).
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.errors import ModelError
from cluster.models.files import read_json
from cluster.validation import describe

ARCHITECTURE = "GraniteMoeForCausalLM"
TRAINING_ONLY = ("initializer_range", "attention_dropout", "router_aux_loss_coef", "output_router_logits", "use_cache")
# What each rope type needs beside rope_theta; original_max_position_embeddings has a default in every type.
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


class RopeParameters(BaseModel):
    """Rotary embedding as in transformers' `rope_parameters`; factors that are unset take transformers' defaults.

    partial_rotary_factor is accepted at 1 only: GraniteMoe rotates whole heads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rope_type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = "default"
    rope_theta: float = Field(10000.0, gt=1)
    partial_rotary_factor: float = Field(1.0, ge=1, le=1)
    factor: float | None = Field(None, gt=0)
    original_max_position_embeddings: int | None = Field(None, gt=0)
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = Field(None, gt=0)
    high_freq_factor: float | None = Field(None, gt=0)
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "RopeParameters":
        for name in ROPE_NEEDS[self.rope_type]:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing: rope_type={self.rope_type!r} needs it")
        return self


class GraniteMoeConfig(BaseModel):
    """The model's shape and multipliers. Unknown keys of config.json are ignored, as transformers does."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    num_local_experts: int = Field(8, gt=0)
    num_experts_per_tok: int = Field(2, gt=0)
    max_position_embeddings: int = Field(2048, gt=0)
    hidden_act: Literal["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] = "silu"
    rms_norm_eps: float = Field(1e-6, gt=0)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    embedding_multiplier: float = 1.0
    logits_scaling: float = Field(1.0, gt=0)
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    rope_parameters: RopeParameters
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @property
    def max_context(self) -> int:
        """Longest sequence (prompt + output) that is computed as the reference model computes it.

        With `dynamic` and `longrope` the reference picks frequencies by the length of the whole sequence, so a
        sequence that outgrows the first regime would need every cached key rotated anew. Inside that regime the
        frequencies are constant, and a server can batch sequences of any length: so that is where we stop.
        """
        if self.rope_parameters.rope_type == "longrope":
            return min(self.rope_original_context, self.max_position_embeddings)
        return self.max_position_embeddings

    @property
    def rope_original_context(self) -> int:
        """Context length before rope scaling; transformers falls back to max_position_embeddings."""
        return self.rope_parameters.original_max_position_embeddings or self.max_position_embeddings

    @model_validator(mode="before")
    @classmethod
    def _from_published_names(cls, raw: dict[str, Any]) -> dict[str, Any]:
        if raw.get("quantization_config"):
            raise ValueError("quantization_config is set: quantised checkpoints are not served, use the original one")
        known = {k: v for k, v in raw.items() if v is not None}
        heads = known.get("num_attention_heads")
        known.setdefault("num_key_value_heads", heads)
        if isinstance(heads, int) and heads > 0 and isinstance(known.get("hidden_size"), int):
            known.setdefault("head_dim", known["hidden_size"] // heads)
        known["rope_parameters"] = _rope_parameters(raw)
        if "eos_token_id" in raw and "eos_token_ids" not in raw:
            eos = raw["eos_token_id"]
            known["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        dtype = raw.get("dtype") or raw.get("torch_dtype")
        known["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
        return known

    @model_validator(mode="after")
    def _is_consistent(self) -> "GraniteMoeConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_local_experts={self.num_local_experts}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: rotary embedding needs an even number")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope_parameters, name)
            if factors is not None and len(factors) != self.head_dim // 2:
                raise ValueError(
                    f"rope_parameters.{name} has {len(factors)} numbers: "
                    f"head_dim={self.head_dim} needs {self.head_dim // 2}"
                )
        return self


def _rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (transformers 5) or the older `rope_theta` + `rope_scaling` ({"type"|"rope_type", ...}).

    Precedence as in transformers: rope_scaling replaces rope_parameters; what the chosen table lacks comes from the
    top level, except that a top-level original_max_position_embeddings wins.
    """
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise ValueError(f"rope_scaling or rope_parameters is {found!r:.100}: it must be an object")
    rope = dict(found)
    older_type = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or older_type or "default"
    for name in ("rope_theta", "partial_rotary_factor"):
        if rope.get(name) is None:
            rope[name] = raw.get(name)
    if raw.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    return {key: value for key, value in rope.items() if value is not None}


def read_model_config(model_dir: Path) -> GraniteMoeConfig:
    """Read and check `config.json`; `eos_token_id` of generation_config.json wins, as in transformers.

    Raises ModelError.
    """
    raw = read_json(model_dir / "config.json")
    if raw.get("model_type") != "granitemoe":
        raise ModelError(
            f"{model_dir}/config.json: model_type={raw.get('model_type')!r:.100} is not served: Outcrop serves "
            f"'granitemoe' ({ARCHITECTURE}), such as ibm-granite/granite-3.1-1b-a400m-instruct or ibm/PowerMoE-3b"
        )
    generation = model_dir / "generation_config.json"
    if generation.exists() and (eos := read_json(generation).get("eos_token_id")) is not None:
        raw["eos_token_id"] = eos
    try:
        return GraniteMoeConfig.model_validate(raw)
    except ValidationError as error:
        raise ModelError(f"{model_dir}/config.json: {describe(error)}") from None
