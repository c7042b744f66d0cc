"""GraniteMoE: PowerMoE-3b, granite-3.0 and 3.1 (1b-a400m, 3b-a800m).

Names and defaults follow transformers' GraniteMoeConfig. A parameter that changes the model is used or refused by
name; one that only matters in training is accepted and has no effect (see TRAINING_ONLY).
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.models.family import Family
from cluster.models.rope import Rope, rope_parameters
from cluster.models.spec import Activation, LayerSpec, ModelSpec, StoredDtype

TRAINING_ONLY = ("initializer_range", "attention_dropout", "router_aux_loss_coef", "output_router_logits", "use_cache")
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Config(BaseModel):
    """config.json. Unknown keys are ignored, as transformers does."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0, le=10_000)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    num_local_experts: int = Field(8, gt=0, le=32_767)  # ids travel in 16 bits
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
    rope_parameters: Rope
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    dtype: StoredDtype | None = None

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
        known["rope_parameters"] = rope_parameters(raw)
        if "eos_token_id" in raw and "eos_token_ids" not in raw:
            eos = raw["eos_token_id"]
            known["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        dtype = raw.get("dtype") or raw.get("torch_dtype")
        known["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
        return known

    @model_validator(mode="after")
    def _is_consistent(self) -> "Config":
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
        self.rope_parameters.check_head(self.head_dim)
        return self


def parse(raw: dict[str, Any]) -> ModelSpec:
    """Raises ValidationError."""
    config = Config.model_validate(raw)
    rope = config.rope_parameters
    return ModelSpec(
        family="granitemoe",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        expert_size=config.intermediate_size,
        layers=(LayerSpec(rope_theta=rope.rope_theta),) * config.num_hidden_layers,
        rope=rope,
        max_positions=config.max_position_embeddings,
        max_context=rope.max_context(config.max_position_embeddings),
        activation=ACTIVATIONS[config.hidden_act],
        norm_eps=config.rms_norm_eps,
        attention_scale=config.attention_multiplier,
        embedding_multiplier=config.embedding_multiplier,
        residual_multiplier=config.residual_multiplier,
        logits_divisor=config.logits_scaling,
        biases=frozenset("qkvo") if config.attention_bias else frozenset(),
        tied_head=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
        dtype=config.dtype,
    )


FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    examples=("ibm-granite/granite-3.1-1b-a400m-instruct", "ibm/PowerMoE-3b"),
    parse=parse,
    model_tensors={
        "embed": ("model.embed_tokens.weight",),
        "norm": ("model.norm.weight",),
        "head": ("lm_head.weight",),
    },
    # transformers 5 writes the older `input_linear` names unless asked for its own. Gate rows come before up rows.
    layer_tensors={
        "attention_norm": ("input_layernorm.weight",),
        "q": ("self_attn.q_proj.weight",),
        "k": ("self_attn.k_proj.weight",),
        "v": ("self_attn.v_proj.weight",),
        "o": ("self_attn.o_proj.weight",),
        "q_bias": ("self_attn.q_proj.bias",),
        "k_bias": ("self_attn.k_proj.bias",),
        "v_bias": ("self_attn.v_proj.bias",),
        "o_bias": ("self_attn.o_proj.bias",),
        "moe_norm": ("post_attention_layernorm.weight",),
        "router": ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
        "gate_up": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
        "down": ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    },
)
