"""Tiny models of every family: between them, a family's models have all that it can differ in."""

from typing import Any

import torch

from tests.checkpoints import GRANITEMOE, SHAPE, YARN, TinyModel

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
SHARED = GRANITEMOE | ROPE | {"shared_intermediate_size": 24}
SWA = GRANITEMOE | ROPE | {"sliding_window": 8, "num_hidden_layers": 4}
QWEN3 = SHAPE | ROPE | {"num_experts": 8, "moe_intermediate_size": 12, "head_dim": 16, "norm_topk_prob": True}
QWEN2 = SHAPE | ROPE | {"num_experts": 8, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
MIXTRAL = SHAPE | ROPE | {"num_local_experts": 8}
OLMOE = SHAPE | ROPE | {"num_experts": 8}


def _models(family: str, base: dict[str, Any], **changes: Any) -> dict[str, TinyModel]:
    def model(change: dict[str, Any]) -> TinyModel:
        own = {name: change[name] for name in ("dtype", "own_names", "max_shard_size") if name in change}
        return TinyModel(base | {k: v for k, v in change.items() if k not in own}, family=family, **own)

    return {f"{family}-{name}": model(change) for name, change in changes.items()}


FAMILIES: dict[str, dict[str, TinyModel]] = {
    "granitemoeshared": _models(
        "granitemoeshared",
        SHARED,
        plain={},
        tied={
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "num_hidden_layers": 5,
        },
        own_names={"own_names": True, "attention_bias": True},
        gelu={"hidden_act": "gelu", "shared_intermediate_size": 13, "max_shard_size": "20KB"},
        no_shared={"shared_intermediate_size": 0, "dtype": torch.bfloat16},
    ),
    "granitemoe_swa": _models(
        "granitemoe_swa",
        SWA,
        plain={},
        long_window={"sliding_window": 100, "shared_intermediate_size": 24, "num_hidden_layers": 3},
        rope_per_layer={"layer_rope_theta": [0, 1e4, 500.0, 0], "sliding_window": 4},
        all_sliding={"layer_types": ["sliding_attention"] * 4, "sliding_window": 2, "own_names": True},
        scaled={"rope_parameters": YARN, "layer_rope_theta": [1e4, 0, 1e5, 1e4], "attention_bias": True},
        multipliers={
            "residual_multiplier": 0.4,
            "embedding_multiplier": 3.0,
            "shared_intermediate_size": 16,
            "dtype": torch.bfloat16,
        },
    ),
    "qwen3_moe": _models(
        "qwen3_moe",
        QWEN3,
        plain={},
        raw_gates={"norm_topk_prob": False, "num_experts_per_tok": 4, "num_key_value_heads": 4},
        dense={"mlp_only_layers": [1], "intermediate_size": 40, "max_shard_size": "20KB"},
        sparse_step={"decoder_sparse_step": 2, "num_hidden_layers": 5, "attention_bias": True},
        window={"use_sliding_window": True, "sliding_window": 6, "own_names": True},
        tied={"tie_word_embeddings": True, "head_dim": 8, "rope_parameters": YARN, "dtype": torch.bfloat16},
    ),
    "mixtral": _models(
        "mixtral",
        MIXTRAL,
        plain={},
        window={"sliding_window": 5, "max_shard_size": "20KB"},
        wide_heads={"head_dim": 24, "num_key_value_heads": 1, "own_names": True},
        top1={"num_experts_per_tok": 1, "tie_word_embeddings": True, "sliding_window": 100},
        all_experts={"num_local_experts": 4, "num_experts_per_tok": 4, "dtype": torch.bfloat16},
    ),
    "olmoe": _models(
        "olmoe",
        OLMOE,
        plain={},
        clipped={"clip_qkv": 0.8, "num_key_value_heads": 4},
        normalised={"norm_topk_prob": True, "attention_bias": True, "max_shard_size": "20KB"},
        top4={"num_experts_per_tok": 4, "num_key_value_heads": 1, "own_names": True},
        tied={"tie_word_embeddings": True, "clip_qkv": 3.0, "dtype": torch.bfloat16},
    ),
    "qwen2_moe": _models(
        "qwen2_moe",
        QWEN2,
        plain={},
        no_bias={"qkv_bias": False, "norm_topk_prob": True, "num_key_value_heads": 4},
        dense={"mlp_only_layers": [0], "intermediate_size": 40, "num_hidden_layers": 4, "max_shard_size": "20KB"},
        window={"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "own_names": True},
        sparse_step={"decoder_sparse_step": 2, "num_hidden_layers": 4, "dtype": torch.bfloat16},
    ),
}
