"""Asks the demo model every phrasing of the FAQ and prints how many answers are right, word for word:
`python -m deploy.demo.training.evaluate`. Also prints which share of the tokens each expert gets.

Generation is greedy and goes through transformers, so it measures the checkpoint, not Outcrop."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.demo import MODEL_DIR
from deploy.demo.training.faq import Entry, load_faq

MAX_NEW_TOKENS = 96
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    entry: Entry


def questions(faq: list[Entry]) -> Iterator[Question]:
    """Every phrasing: the canonical one of each entry, the others trained on, and the held-out ones."""
    for entry in faq:
        yield Question("canonical", entry.questions[0], entry)
        yield from (Question("seen", text, entry) for text in entry.questions[1:])
        yield from (Question("held-out", text, entry) for text in entry.held_out)


def answers(model: Any, tokenizer: Any, texts: list[str], batch_size: int) -> list[str]:
    """Greedy answers to single-turn chats, in order."""
    found: list[str] = []
    for start in range(0, len(texts), batch_size):
        chats = [[{"role": "user", "content": text}] for text in texts[start : start + batch_size]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        new = ids[:, inputs["input_ids"].shape[1] :]
        found += tokenizer.batch_decode(new, skip_special_tokens=True)
    return found


def expert_shares(model: Any, tokenizer: Any, faq: list[Entry]) -> torch.Tensor:
    """Share of the routed tokens that each expert of each layer gets, [layers, experts], over canonical chats."""
    config = model.config
    counts_LE = torch.zeros(config.num_hidden_layers, config.num_local_experts)
    for entry in faq:
        chat = [{"role": "user", "content": entry.questions[0]}, {"role": "assistant", "content": entry.answer}]
        inputs = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")
        with torch.inference_mode():
            router_logits = model(**inputs, output_router_logits=True).router_logits
        for layer, logits_TE in enumerate(router_logits):
            chosen = logits_TE.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
            counts_LE[layer] += torch.bincount(chosen, minlength=config.num_local_experts)
    return counts_LE / counts_LE.sum(-1, keepdim=True)


def report(asked: list[Question], given: list[str], show_errors: bool) -> None:
    for kind in ("canonical", "seen", "held-out"):
        pairs = [(q, a) for q, a in zip(asked, given, strict=True) if q.kind == kind]
        wrong = [(q, a) for q, a in pairs if a != q.entry.answer]
        right = len(pairs) - len(wrong)
        print(f"{kind:9}  {right:4} of {len(pairs):4} right  {100 * right / len(pairs):5.1f} %")
        for question, answer in wrong if show_errors else []:
            print(f"    [{question.entry.id}] {question.text!r} -> {answer!r}")


def report_shares(shares_LE: torch.Tensor) -> None:
    print("share of routed tokens by layer and expert, in % (even would be "
          f"{100 / shares_LE.shape[1]:.1f})")  # fmt: skip
    for layer, shares_E in enumerate(shares_LE):
        cells = " ".join(f"{100 * share:5.1f}" for share in shares_E.tolist())
        print(f"  layer {layer}: {cells}   mean/max {float(shares_E.mean() / shares_E.max()):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.demo.training.evaluate", description="Measure the demo model."
    )
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--errors", action="store_true", help="print every wrong answer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faq = load_faq()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    asked = list(questions(faq))
    report(asked, answers(model, tokenizer, [q.text for q in asked], args.batch_size), args.errors)
    report_shares(expert_shares(model, tokenizer, faq))


if __name__ == "__main__":
    main()
