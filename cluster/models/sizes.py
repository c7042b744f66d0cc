"""What a model weighs, and what a token takes of the KV cache, from its spec alone. In bytes."""

import math
from dataclasses import dataclass

from cluster.models.checkpoint import needed_tensors
from cluster.models.spec import ModelSpec

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Sizes:
    """`front` is everything but the experts of all layers."""

    front: int
    experts: int
    kv_per_token: int

    @classmethod
    def of(cls, spec: ModelSpec, dtype: str) -> "Sizes":
        """As they are once all weights have this type."""
        item, front, experts = ITEM_BYTES[dtype], 0, 0
        for key, _, shape in needed_tensors(spec):
            num_bytes = item * math.prod(shape)
            if ".experts." in key:
                experts += num_bytes
            else:
                front += num_bytes
        return cls(front, experts, kv_bytes_per_token(spec, item))


def kv_bytes_per_token(spec: ModelSpec, item: int) -> int:
    """Keys and values of every layer, and which experts have computed the token."""
    routed = spec.num_expert_layers * spec.top_k * (1 if spec.num_experts <= 256 else 2)
    return spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * item + routed
