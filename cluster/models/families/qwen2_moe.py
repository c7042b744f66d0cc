"""Qwen2-MoE: Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B. Biases of q, k and v; a shared expert with a gate of its own.

Names and defaults follow transformers' Qwen2MoeConfig.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.models.decoder import EXPERT_NAMES, MODEL_NAMES
from cluster.models.families import qwen3_moe
from cluster.models.family import Family
from cluster.models.spec import ModelSpec


class Config(qwen3_moe.SparseConfig):
    """config.json. With `use_sliding_window` every other layer below `max_window_layers` has a window, unless
    `layer_types` says otherwise.
    """

    num_experts: int = Field(60, gt=0, le=32_767)
    num_experts_per_tok: int = Field(4, gt=0)
    moe_intermediate_size: int = Field(1408, gt=0)
    shared_expert_intermediate_size: int = Field(5632, gt=0)
    qkv_bias: bool = True
    max_window_layers: int = Field(28, ge=0)
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None

    @model_validator(mode="after")
    def _tells_of_each_layer(self) -> "Config":
        self.check_layers("layer_types")
        if not self.use_sliding_window and "sliding_attention" in (self.layer_types or ()):
            raise ValueError("layer_types has sliding_attention, and use_sliding_window is not set: set both or none")
        return self

    def spec(self, family: str, **own: Any) -> ModelSpec:
        return super().spec(
            family,
            layers=self.sparse_layers(tuple(map(self._window, range(self.num_hidden_layers)))),
            biases=frozenset("qkv") if self.qkv_bias else frozenset(),
            shared_size=self.shared_expert_intermediate_size,
            shared_is_gated=True,
            **own,
        )

    def _window(self, number: int) -> int | None:
        if self.layer_types is not None:
            has_window = self.layer_types[number] == "sliding_attention"
        else:
            has_window = self.use_sliding_window and number < self.max_window_layers and number % 2 == 0
        return self.sliding_window if has_window else None


LAYER_NAMES = qwen3_moe.LAYER_NAMES | {
    **{f"shared_{key}": (f"mlp.shared_expert.{key}_proj.weight",) for key in ("gate", "up", "down")},
    "shared_gating": ("mlp.shared_expert_gate.weight",),
}

FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    examples=("Qwen/Qwen1.5-MoE-A2.7B", "Qwen/Qwen2-57B-A14B"),
    parse=lambda raw: Config.model_validate(raw).spec("qwen2_moe"),
    model_tensors=MODEL_NAMES,
    layer_tensors=LAYER_NAMES,
    expert_forms=EXPERT_NAMES,
)
