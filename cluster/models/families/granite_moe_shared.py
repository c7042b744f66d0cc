"""GraniteMoeShared: GraniteMoE with a shared MLP beside the experts of each layer.

Names and defaults follow transformers' GraniteMoeSharedConfig.
"""

from typing import Any

from pydantic import Field

from cluster.models.decoder import MODEL_NAMES
from cluster.models.families import granite_moe
from cluster.models.family import Family
from cluster.models.spec import ModelSpec


class Config(granite_moe.Config):
    """config.json. Without a `shared_intermediate_size` there is no shared MLP."""

    shared_intermediate_size: int = Field(0, ge=0)

    def spec(self, family: str, **own: Any) -> ModelSpec:
        return super().spec(family, shared_size=self.shared_intermediate_size, **own)


LAYER_NAMES = granite_moe.LAYER_NAMES | {
    "shared_gate_up": ("shared_mlp.input_linear.weight",),
    "shared_down": ("shared_mlp.output_linear.weight",),
}

FAMILY = Family(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    examples=("ibm-research/moe-7b-1b-active-shared-experts",),
    parse=lambda raw: Config.model_validate(raw).spec("granitemoeshared"),
    model_tensors=MODEL_NAMES,
    layer_tensors=LAYER_NAMES,
    expert_forms=(granite_moe.STACKED_EXPERTS,),
)
