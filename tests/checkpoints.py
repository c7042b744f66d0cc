"""Tiny random checkpoints, written by transformers, and transformers as the oracle that reads them back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.byte_tokenizer import END_ID, write_tokenizer


@dataclass(frozen=True)
class TinyModel:
    """What to write: a GraniteMoE model of 8 experts unless it says otherwise. `own_names` uses the names of
    transformers 5 instead of the published ones. Other families start from nothing (tests/families.py).
    """

    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    own_names: bool = False
    max_shard_size: str = "1GB"
    family: str = "granitemoe"


# What all tiny models have, of whatever family.
SHAPE: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": END_ID,
    "eos_token_id": END_ID,
    "pad_token_id": END_ID,
}
GRANITEMOE = SHAPE | {"num_local_experts": 8, "attention_multiplier": 0.5, "logits_scaling": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [2.0, 3.0, 5.0, 9.0],
    "original_max_position_embeddings": 128,
}
GRANITE = {
    "tie_word_embeddings": True,
    "embedding_multiplier": 12.0,
    "logits_scaling": 6.0,
    "residual_multiplier": 0.22,
    "num_hidden_layers": 6,
    "rope_theta": 1.5e6,
}

MODELS = {
    "granite": TinyModel(GRANITE),
    "top1-mha-untied": TinyModel({"num_experts_per_tok": 1, "num_key_value_heads": 4}, own_names=True),
    "top8-mqa": TinyModel({"num_local_experts": 16, "num_experts_per_tok": 8, "num_key_value_heads": 1}),
    "bias-sharded": TinyModel({"attention_bias": True, "tie_word_embeddings": True}, max_shard_size="20KB"),
    "bf16-file": TinyModel({"num_experts_per_tok": 3}, dtype=torch.bfloat16),
    "bf16-sharded-own-names": TinyModel(
        {"attention_bias": True}, dtype=torch.bfloat16, own_names=True, max_shard_size="10KB"
    ),
    "linear": TinyModel({"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}}),
    "yarn": TinyModel({"rope_parameters": YARN, "num_key_value_heads": 4}, max_shard_size="30KB"),
    "yarn-mscale": TinyModel({"rope_parameters": YARN | {"mscale": 1.4, "mscale_all_dim": 0.6, "truncate": False}}),
    "llama3": TinyModel({"rope_parameters": LLAMA3, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "dynamic": TinyModel({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e3, "factor": 2.0}}),
    "longrope": TinyModel({"rope_parameters": LONGROPE}),
    "odd-sizes": TinyModel({"vocab_size": 261, "intermediate_size": 13, "num_local_experts": 5}),
    "multipliers": TinyModel(
        {
            "embedding_multiplier": 3.3,
            "residual_multiplier": 0.61,
            "attention_multiplier": 0.9,
            "logits_scaling": 0.7,
            "rms_norm_eps": 1e-2,
        }
    ),
    "wide-heads-gelu": TinyModel({"head_dim": 24, "hidden_act": "gelu", "attention_bias": True}),
    "all-experts": TinyModel({"num_local_experts": 4, "num_experts_per_tok": 4, "rope_theta": 1e7}),
}


def write_checkpoint(model: TinyModel, out: Path, seed: int = 0) -> Path:
    """Write the model and a byte-level tokenizer to the directory `out` and return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    base = GRANITEMOE if model.family == "granitemoe" else {}
    config = AutoConfig.for_model(model.family, **base | model.config)
    reference = AutoModelForCausalLM.from_config(config)
    for name, weight in reference.named_parameters():
        weight.data = _random_weight(name, weight, config)
    reference.to(model.dtype).save_pretrained(
        out, max_shard_size=model.max_shard_size, save_original_format=not model.own_names
    )
    write_tokenizer(out, config.vocab_size)
    return out


def _random_weight(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Scaled so that no part of the model is negligible: every block changes the residual stream, routing is sharp
    enough to matter, and even with a tied head the next token is not simply the last one."""
    noise = torch.randn_like(weight)
    if "embed_tokens" in name:
        return noise * (0.3 if config.tie_word_embeddings else 1.0) / getattr(config, "embedding_multiplier", 1.0)
    if name.endswith("sinks"):
        return noise
    if "norm" in name:
        return 1 + 0.3 * noise
    if name.endswith("bias"):
        return 0.5 * noise
    return 2.0 * noise / weight.shape[-1] ** 0.5


def load_reference(model_dir: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model in its plainest form: eager attention, one expert after the other."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def generate(reference: Any, prompt: list[int], num_tokens: int, allowed: list[int] | None = None) -> list[int]:
    """Greedy continuation of exactly `num_tokens` tokens, of those `allowed`; end-of-sequence does not stop it."""
    reference.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    # The mask is given because transformers takes token 0, our padding, for padding wherever it is.
    only = None if allowed is None else lambda *_: allowed
    options = {"max_new_tokens": num_tokens, "do_sample": False, "prefix_allowed_tokens_fn": only}
    out = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()
