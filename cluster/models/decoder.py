"""What the config.json and the tensors of most families have in common. A family's module adds what is its own.

A key that changes what the model computes is used or refused by name. Keys that change nothing here are NEUTRAL; any
other key that is set is refused, for nobody knows what the model would compute with it.
"""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.models.rope import Rope, rope_parameters
from cluster.models.spec import Activation, LayerSpec, ModelSpec, StoredDtype

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
TRAINING_ONLY = ("initializer_range", "attention_dropout", "router_aux_loss_coef", "output_router_logits", "use_cache")
# Read elsewhere (ends of sequences, spellings of rope and type), or said of the file and not of the model.
NEUTRAL = frozenset(TRAINING_ONLY) | {
    "model_type", "architectures", "transformers_version", "auto_map", "name_or_path", "pad_token_id", "eos_token_id",
    "torch_dtype", "rope_theta", "rope_scaling", "original_max_position_embeddings", "partial_rotary_factor",
    "return_dict", "output_attentions", "output_hidden_states", "pretraining_tp", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "task_specific_params", "unsloth_fixed",
    "unsloth_version",
}  # fmt: skip


class Decoder(BaseModel):
    """Keys that all families have; defaults are those of transformers where it has one for all of them."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)
    # Whether num_key_value_heads may be left out, for one key head per query head.
    HAS_KV_DEFAULT: ClassVar[bool] = True
    NEUTRAL_HERE: ClassVar[frozenset[str]] = frozenset()
    ROPE_THETA: ClassVar[float] = 10_000.0

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0, le=10_000)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    num_experts_per_tok: int = Field(2, gt=0)
    max_position_embeddings: int = Field(2048, gt=0)
    hidden_act: Literal["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] = "silu"
    rms_norm_eps: float = Field(1e-6, gt=0)
    tie_word_embeddings: bool = False
    rope_parameters: Rope
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: StoredDtype | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_published_names(cls, raw: dict[str, Any]) -> dict[str, Any]:
        if raw.get("quantization_config"):
            raise ValueError("quantization_config is set: quantised checkpoints are not served, use the original one")
        cls._refuse_unknown(raw)
        # null stands for the default, but of this key it is a value of its own: no window.
        known = {k: v for k, v in raw.items() if v is not None or k == "sliding_window"}
        heads = known.get("num_attention_heads")
        if cls.HAS_KV_DEFAULT:
            known.setdefault("num_key_value_heads", heads)
        if isinstance(heads, int) and heads > 0 and isinstance(known.get("hidden_size"), int):
            known.setdefault("head_dim", known["hidden_size"] // heads)
        known["rope_parameters"] = {"rope_theta": cls.ROPE_THETA} | rope_parameters(raw)
        if "eos_token_id" in raw and "eos_token_ids" not in raw:
            eos = raw["eos_token_id"]
            known["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        dtype = raw.get("dtype") or raw.get("torch_dtype")
        known["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
        return known

    @classmethod
    def _refuse_unknown(cls, raw: dict[str, Any]) -> None:
        known = cls.model_fields.keys() | NEUTRAL | cls.NEUTRAL_HERE
        for key, value in raw.items():
            if key not in known and not key.startswith("_") and value not in (None, False, "", [], {}):
                raise ValueError(
                    f"{key}={value!r:.100} is not known of {raw.get('model_type')!r}: it must not be set; "
                    "take it out of config.json only if the model computes the same without it"
                )

    @model_validator(mode="after")
    def _is_consistent(self) -> "Decoder":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        self.rope_parameters.check_head(self.head_dim)
        return self

    def check_top_k(self, name: str, num_experts: int) -> None:
        """Raises ValueError; `name` is the key that says how many experts there are."""
        if self.num_experts_per_tok > num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} is more than {name}={num_experts}")

    def check_layers(self, *names: str) -> None:
        """Raises ValueError where a key that lists layers has another number of them."""
        for name in names:
            told = getattr(self, name)
            if told is not None and len(told) != self.num_hidden_layers:
                raise ValueError(f"{name} tells of {len(told)} layers: num_hidden_layers={self.num_hidden_layers}")

    def plain_layers(self, window: int | None = None) -> tuple[LayerSpec, ...]:
        """Layers that are all alike."""
        return (LayerSpec(window=window, rope_theta=self.rope_parameters.rope_theta),) * self.num_hidden_layers

    def spec(self, family: str, **own: Any) -> ModelSpec:
        """`own` is what the family says beside the keys above: experts, layers, and whatever is not as by default.
        Scores are divided by the square root of a head's size unless it says otherwise.
        """
        rope = self.rope_parameters
        common: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "top_k": self.num_experts_per_tok,
            "rope": rope,
            "max_positions": self.max_position_embeddings,
            "max_context": rope.max_context(self.max_position_embeddings),
            "activation": ACTIVATIONS[self.hidden_act],
            "norm_eps": self.rms_norm_eps,
            "attention_scale": self.head_dim**-0.5,
            "tied_head": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": self.eos_token_ids,
            "dtype": self.dtype,
        }
        return ModelSpec(family=family, **common | own)


class LocalExperts(Decoder):
    """Of families that call the number of their experts so."""

    num_local_experts: int = Field(8, gt=0, le=32_767)  # ids travel in 16 bits

    @model_validator(mode="after")
    def _has_enough_experts(self) -> "LocalExperts":
        self.check_top_k("num_local_experts", self.num_local_experts)
        return self


MODEL_NAMES = {
    "embed": ("model.embed_tokens.weight",),
    "norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
}
ATTENTION_NAMES = {
    "attention_norm": ("input_layernorm.weight",),
    **{key: (f"self_attn.{key}_proj.weight",) for key in "qkvo"},
    **{f"{key}_bias": (f"self_attn.{key}_proj.bias",) for key in "qkvo"},
    "moe_norm": ("post_attention_layernorm.weight",),
}
QK_NORM_NAMES = {"q_norm": ("self_attn.q_norm.weight",), "k_norm": ("self_attn.k_norm.weight",)}
# Of the Hub's checkpoints each expert has tensors of its own; transformers 5 can write them stacked.
EXPERT_NAMES = (
    {key: (f"mlp.experts.{{}}.{key}_proj.weight",) for key in ("gate", "up", "down")},
    {"gate_up": ("mlp.experts.gate_up_proj",), "down": ("mlp.experts.down_proj",)},
)
