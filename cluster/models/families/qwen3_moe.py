"""Qwen3-MoE: Qwen3-30B-A3B and its siblings, Qwen3-235B-A22B.

Names and defaults follow transformers' Qwen3MoeConfig.
"""

from typing import Any, ClassVar

from pydantic import Field, model_validator

from cluster.models.decoder import ATTENTION_NAMES, EXPERT_NAMES, MODEL_NAMES, QK_NORM_NAMES, Decoder
from cluster.models.family import Family
from cluster.models.spec import LayerSpec, ModelSpec, RouterRule


class SparseConfig(Decoder):
    """Keys of config.json that say which layers have experts."""

    HAS_KV_DEFAULT: ClassVar[bool] = False

    num_experts: int = Field(128, gt=0, le=32_767)  # ids travel in 16 bits
    num_experts_per_tok: int = Field(8, gt=0)
    moe_intermediate_size: int = Field(768, gt=0)
    norm_topk_prob: bool = False
    decoder_sparse_step: int = Field(1, gt=0)
    mlp_only_layers: tuple[int, ...] = ()
    use_sliding_window: bool = False
    sliding_window: int | None = Field(4096, ge=0)
    max_window_layers: int | None = Field(None, ge=0)
    max_position_embeddings: int = Field(32768, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _has_one_name_for_experts(cls, raw: dict[str, Any]) -> dict[str, Any]:
        known = dict(raw)
        if (number := known.pop("num_local_experts", None)) is not None:
            known.setdefault("num_experts", number)
        return known

    @model_validator(mode="after")
    def _has_experts(self) -> "SparseConfig":
        self.check_top_k("num_experts", self.num_experts)
        if not any(map(self.has_experts, range(self.num_hidden_layers))):
            raise ValueError("no layer has experts: see mlp_only_layers and decoder_sparse_step")
        if self.use_sliding_window and not self.sliding_window:
            raise ValueError("use_sliding_window wants a sliding_window")
        return self

    def has_experts(self, number: int) -> bool:
        """Whether this layer has; one that has not has an MLP of its own."""
        return number not in self.mlp_only_layers and (number + 1) % self.decoder_sparse_step == 0

    def sparse_layers(self, windows: tuple[int | None, ...]) -> tuple[LayerSpec, ...]:
        """All layers, with the window of each."""
        theta = self.rope_parameters.rope_theta
        return tuple(LayerSpec(self.has_experts(i), window, theta) for i, window in enumerate(windows))

    def spec(self, family: str, **own: Any) -> ModelSpec:
        experts = {
            "num_experts": self.num_experts,
            "expert_size": self.moe_intermediate_size,
            "dense_size": self.intermediate_size,
            "router": RouterRule("all", self.norm_topk_prob),
        }
        return super().spec(family, **experts | own)


class Config(SparseConfig):
    """config.json."""

    attention_bias: bool = False

    @model_validator(mode="after")
    def _has_windows_everywhere(self) -> "Config":
        # transformers has a window in all layers then, vLLM in none below this number: whoever trained it knows.
        if self.use_sliding_window and (self.max_window_layers or 0) not in (0, self.num_hidden_layers):
            raise ValueError(
                f"max_window_layers={self.max_window_layers} with use_sliding_window is not served: it must be 0 or "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        return self

    def spec(self, family: str, **own: Any) -> ModelSpec:
        window = self.sliding_window if self.use_sliding_window else None
        return super().spec(
            family,
            layers=self.sparse_layers((window,) * self.num_hidden_layers),
            biases=frozenset("qkvo") if self.attention_bias else frozenset(),
            qk_norm="head",
            **own,
        )


LAYER_NAMES = ATTENTION_NAMES | {
    "router": ("mlp.gate.weight",),
    **{f"dense_{key}": (f"mlp.{key}_proj.weight",) for key in ("gate", "up", "down")},
}

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    examples=("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B"),
    parse=lambda raw: Config.model_validate(raw).spec("qwen3_moe"),
    model_tensors=MODEL_NAMES,
    layer_tensors=LAYER_NAMES | QK_NORM_NAMES,
    expert_forms=EXPERT_NAMES,
)
