"""Trains the demo model from scratch on a CPU: `python -m deploy.demo.training.train --out DIR`.

A real GraniteMoE, small enough to ship: it learns faq.yaml by heart, so its routing is that of a trained model.
transformers (a development dependency) provides the model; the tokenizer is trained here too.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

from deploy.demo import MODEL_DIR
from deploy.demo.training.augment import TOPIC_TEMPLATES
from deploy.demo.training.dataset import Batch, ConversationSampler
from deploy.demo.training.faq import Entry, load_faq
from deploy.demo.training.power_scheduler import PowerSchedule, batch_in_sequences, power_lr
from deploy.demo.training.tokenizer import ROLES, save_tokenizer, train_tokenizer

VOCAB_SIZE = 1536
# Shape suffixes: B batch, S sequence, V vocabulary, T tokens, E experts, K top-k.
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
# Granite's multipliers. 1/32 is 1/head_dim, as the real checkpoints use 1/64 for a head of 64.
MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.03125,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}
RENAMES = (
    (".block_sparse_moe.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),
    (".block_sparse_moe.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
    (".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight"),
)


def build_config(vocab_size: int = VOCAB_SIZE, **changes: Any) -> GraniteMoeConfig:
    """The demo model's config; `changes` override single fields."""
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "router_aux_loss_coef": 0.01,
        **SHAPE,
        **MULTIPLIERS,
        **changes,
    }
    return GraniteMoeConfig(**fields)


def tokenizer_texts(faq: list[Entry]) -> list[str]:
    """What the tokenizer learns its words from; held-out phrasings stay unseen here as well."""
    texts = [text for e in faq for text in (e.answer, *e.questions, *e.topics, *e.actions, *e.events)]
    common = [*TOPIC_TEMPLATES, *(ROLES * 20)]
    return texts + [text.lower() for text in texts] + common


def balance_loss(router_logits: Sequence[torch.Tensor], mask_BS: torch.Tensor, top_k: int) -> torch.Tensor:
    """Switch-style load balancing, averaged over layers; 1 is perfectly even.

    Per layer on purpose: transformers' version pools all layers, and a dead expert in one can hide there."""
    mask_T = mask_BS.reshape(-1)
    losses = []
    for logits_TE in router_logits:
        num_experts = logits_TE.shape[-1]
        probs_TE = logits_TE.float().softmax(-1) * mask_T[:, None]
        chosen_TK = logits_TE.topk(top_k, dim=-1).indices
        load_TE = F.one_hot(chosen_TK, num_experts).sum(1).float() * mask_T[:, None]
        losses.append(num_experts * (load_TE.sum(0) / load_TE.sum() * probs_TE.sum(0) / mask_T.sum()).sum())
    return torch.stack(losses).mean()


def train_step(
    model: GraniteMoeForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, lr: float
) -> tuple[float, float]:
    """One update at learning rate `lr`. Returns (weighted loss per target token, balance loss)."""
    out = model(input_ids=batch.ids, attention_mask=batch.mask, output_router_logits=True, use_cache=False)
    losses = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    loss = (losses * weights).sum() / weights.sum()
    top_k, coefficient = model.config.num_experts_per_tok, model.config.router_aux_loss_coef
    assert top_k is not None
    assert coefficient is not None
    balance = balance_loss(out.router_logits, batch.mask, top_k)
    torch.autograd.backward(loss + coefficient * balance)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()), float(balance.detach())


def build_optimizer(model: GraniteMoeForCausalLM, weight_decay: float = 0.1) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-9)


def train(
    faq: list[Entry], tokenizer: Tokenizer, args: argparse.Namespace, config: GraniteMoeConfig | None = None
) -> GraniteMoeForCausalLM:
    """Train until `args.tokens` tokens are seen; the demo's own shape unless a config is given."""
    torch.manual_seed(args.seed)
    model = GraniteMoeForCausalLM(config or build_config(tokenizer.get_vocab_size()))
    model.train()
    optimizer = build_optimizer(model)
    sampler = ConversationSampler(faq, tokenizer, args.seed)
    schedule = None
    seen, step, started = 0, 0, time.monotonic()
    for batch in sampler.batches(args.batch_size):
        if schedule is None:
            schedule = build_schedule(args, sampler)
        lr = power_lr(schedule, seen + batch.num_tokens)
        loss, balance = train_step(model, optimizer, batch, lr)
        seen, step = seen + batch.num_tokens, step + 1
        if step % 50 == 0 or seen >= args.tokens:
            print(f"step {step} tokens {seen} lr {lr:.2e} loss {loss:.4f} balance {balance:.3f} "
                  f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
        if seen >= args.tokens:
            return model
    raise AssertionError("batches() is endless")


def build_schedule(args: argparse.Namespace, sampler: ConversationSampler) -> PowerSchedule:
    mean_length = sum(len(sampler.sample()[0]) for _ in range(500)) / 500
    return PowerSchedule(
        batch_size=batch_in_sequences(args.batch_size * mean_length),
        lr_max=args.lr_max,
        warmup_tokens=args.tokens // 25,
        total_tokens=args.tokens,
        decay_tokens=args.tokens // 4,
    )


def published_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 names -> the names of published GraniteMoE checkpoints; the tied head is left out."""
    renamed = {}
    for name, tensor in state.items():
        for new, published in RENAMES:
            name = name.replace(new, published)
        if name != "lm_head.weight":
            renamed[name] = tensor
    return renamed


def save_model(model: GraniteMoeForCausalLM, tokenizer: Tokenizer, out: Path, dtype: torch.dtype) -> None:
    """Write the Hugging Face layout: config, generation config, weights, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to(dtype).contiguous() for k, v in published_names(dict(model.state_dict())).items()}
    save_file(state, str(out / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False))
    keep = GraniteMoeConfig().to_diff_dict().keys() | build_config().to_diff_dict().keys()
    config = {k: v for k, v in config.items() if k in keep}
    config |= {"architectures": ["GraniteMoeForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    save_tokenizer(tokenizer, out, model.config.max_position_embeddings)


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo.training.train", description="Train the demo model.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--tokens", type=int, default=8_000_000, help="tokens to train on")
    parser.add_argument("--batch-size", type=int, default=48, help="conversations in a batch")
    parser.add_argument("--lr-max", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    faq = load_faq()
    tokenizer = train_tokenizer(tokenizer_texts(faq), VOCAB_SIZE)
    model = train(faq, tokenizer, args)
    save_model(model, tokenizer, args.out, torch.bfloat16)
    print(f"wrote {args.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
