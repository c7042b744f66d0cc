"""Mixtral 8x7B and 8x22B.

Names and defaults follow transformers' MixtralConfig.
"""

from typing import Any, ClassVar

from pydantic import Field

from cluster.models.decoder import ATTENTION_NAMES, EXPERT_NAMES, MODEL_NAMES, LocalExperts
from cluster.models.family import Family
from cluster.models.spec import ModelSpec, RouterRule


class Config(LocalExperts):
    """config.json. A `sliding_window` is that of all layers. Noise of the router is for training."""

    HAS_KV_DEFAULT: ClassVar[bool] = False
    NEUTRAL_HERE: ClassVar[frozenset[str]] = frozenset({"router_jitter_noise"})
    ROPE_THETA: ClassVar[float] = 1e6

    sliding_window: int | None = Field(None, gt=0)
    max_position_embeddings: int = Field(131_072, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0)
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)

    def spec(self, family: str, **own: Any) -> ModelSpec:
        return super().spec(
            family,
            num_experts=self.num_local_experts,
            expert_size=self.intermediate_size,
            layers=self.plain_layers(self.sliding_window),
            router=RouterRule("all", is_normalised=True),
            **own,
        )


# w1, w3 and w2 of the Hub's checkpoints are gate, up and down.
PUBLISHED = {
    key: (f"block_sparse_moe.experts.{{}}.{name}.weight",)
    for key, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    examples=("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x22B-v0.1"),
    parse=lambda raw: Config.model_validate(raw).spec("mixtral"),
    model_tensors=MODEL_NAMES,
    layer_tensors=ATTENTION_NAMES | {"router": ("block_sparse_moe.gate.weight", "mlp.gate.weight")},
    expert_forms=(PUBLISHED, EXPERT_NAMES[1]),
)
