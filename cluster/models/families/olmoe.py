"""OLMoE: OLMoE-1B-7B-0924. q and k are normed over their whole projections, and clipped; gates are not normalised.

Names and defaults follow transformers' OlmoeConfig.
"""

from typing import Any

from pydantic import Field, model_validator

from cluster.models.decoder import ATTENTION_NAMES, EXPERT_NAMES, MODEL_NAMES, QK_NORM_NAMES, Decoder
from cluster.models.family import Family
from cluster.models.spec import ModelSpec, RouterRule


class Config(Decoder):
    """config.json."""

    num_experts: int = Field(64, gt=0, le=32_767)  # ids travel in 16 bits
    num_experts_per_tok: int = Field(8, gt=0)
    norm_topk_prob: bool = False
    attention_bias: bool = False
    clip_qkv: float | None = Field(None, gt=0)
    max_position_embeddings: int = Field(4096, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0)
    eos_token_ids: tuple[int, ...] = (50279,)

    @model_validator(mode="after")
    def _has_heads_of_one_size(self) -> "Config":
        self.check_top_k("num_experts", self.num_experts)
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"head_dim={self.head_dim} is not served: it must be hidden_size / num_attention_heads, for the norms "
                "of q and k have that width"
            )
        return self

    def spec(self, family: str, **own: Any) -> ModelSpec:
        return super().spec(
            family,
            num_experts=self.num_experts,
            expert_size=self.intermediate_size,
            layers=self.plain_layers(),
            router=RouterRule("all", self.norm_topk_prob),
            biases=frozenset("qkvo") if self.attention_bias else frozenset(),
            qk_norm="projection",
            clip_qkv=self.clip_qkv,
            **own,
        )


FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    examples=("allenai/OLMoE-1B-7B-0924",),
    parse=lambda raw: Config.model_validate(raw).spec("olmoe"),
    model_tensors=MODEL_NAMES,
    layer_tensors=ATTENTION_NAMES | QK_NORM_NAMES | {"router": ("mlp.gate.weight",)},
    expert_forms=EXPERT_NAMES,
)
