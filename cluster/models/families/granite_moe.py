"""GraniteMoE: PowerMoE-3b, granite-3.0 and 3.1 (1b-a400m, 3b-a800m).

Names and defaults follow transformers' GraniteMoeConfig.
"""

from typing import Any

from pydantic import Field

from cluster.models.decoder import ATTENTION_NAMES, MODEL_NAMES, LocalExperts
from cluster.models.family import Family
from cluster.models.spec import ModelSpec


class Config(LocalExperts):
    """config.json."""

    attention_bias: bool = False
    embedding_multiplier: float = 1.0
    logits_scaling: float = Field(1.0, gt=0)
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)

    def spec(self, family: str, **own: Any) -> ModelSpec:
        multipliers = {
            "num_experts": self.num_local_experts,
            "expert_size": self.intermediate_size,
            "layers": self.plain_layers(),
            "attention_scale": self.attention_multiplier,
            "embedding_multiplier": self.embedding_multiplier,
            "residual_multiplier": self.residual_multiplier,
            "logits_divisor": self.logits_scaling,
            "biases": frozenset("qkvo") if self.attention_bias else frozenset(),
        }
        return super().spec(family, **multipliers | own)


# transformers 5 writes the older `input_linear` names unless asked for its own. Gate rows come before up rows.
LAYER_NAMES = ATTENTION_NAMES | {
    "router": ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
}
STACKED_EXPERTS = {
    "gate_up": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    "down": ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
}

FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    examples=("ibm-granite/granite-3.1-1b-a400m-instruct", "ibm/PowerMoE-3b"),
    parse=lambda raw: Config.model_validate(raw).spec("granitemoe"),
    model_tensors=MODEL_NAMES,
    layer_tensors=LAYER_NAMES,
    expert_forms=(STACKED_EXPERTS,),
)
