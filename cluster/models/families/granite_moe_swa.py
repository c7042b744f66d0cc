"""GraniteMoeSWA: granite-swash-3b-a600m. GraniteMoeShared with attention windows, sinks and a rope base per layer.

Names and defaults follow transformers' GraniteMoeSWAConfig.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.models.decoder import MODEL_NAMES
from cluster.models.families import granite_moe, granite_moe_shared
from cluster.models.family import Family
from cluster.models.spec import LayerSpec, ModelSpec


class Config(granite_moe_shared.Config):
    """config.json. Every fourth layer attends to all tokens unless `layer_types` says otherwise; a rope base of 0 is
    a layer without position encoding.
    """

    sliding_window: int = Field(128, gt=0)
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    layer_rope_theta: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _tells_of_each_layer(self) -> "Config":
        self.check_layers("layer_types", "layer_rope_theta")
        if any(theta != 0 and theta <= 1 for theta in self.layer_rope_theta or ()):
            raise ValueError(f"layer_rope_theta={self.layer_rope_theta!r:.100}: each must be 0 or more than 1")
        return self

    def spec(self, family: str, **own: Any) -> ModelSpec:
        number = self.num_hidden_layers
        kinds = self.layer_types or tuple("sliding_attention" if i % 4 else "full_attention" for i in range(number))
        thetas = self.layer_rope_theta or (self.rope_parameters.rope_theta,) * number
        layers = tuple(
            LayerSpec(window=self.sliding_window if kind == "sliding_attention" else None, rope_theta=theta or None)
            for kind, theta in zip(kinds, thetas, strict=True)
        )
        return super().spec(family, layers=layers, has_sinks=True, **own)


# Published with the names of transformers 5, unlike its elders.
LAYER_NAMES = granite_moe_shared.LAYER_NAMES | {
    "router": granite_moe.LAYER_NAMES["router"][::-1],
    "sinks": ("self_attn.sinks",),
}

FAMILY = Family(
    model_type="granitemoe_swa",
    architecture="GraniteMoeSWAForCausalLM",
    examples=("ibm-granite/granite-swash-3b-a600m",),
    parse=lambda raw: Config.model_validate(raw).spec("granitemoe_swa"),
    model_tensors=MODEL_NAMES,
    layer_tensors=LAYER_NAMES,
    expert_forms=({key: names[::-1] for key, names in granite_moe.STACKED_EXPERTS.items()},),
)
