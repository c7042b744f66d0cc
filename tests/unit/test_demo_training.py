"""The demo model: its FAQ, its files, its tokenizer and its training step."""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeForCausalLM

from deploy.demo import DEMO_DIR, MODEL_DIR
from deploy.demo.training.augment import phrase
from deploy.demo.training.dataset import ConversationSampler
from deploy.demo.training.evaluate import answers, expert_shares
from deploy.demo.training.faq import Entry, load_faq, normalise
from deploy.demo.training.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer
from deploy.demo.training.train import (
    balance_loss,
    build_config,
    build_optimizer,
    save_model,
    tokenizer_texts,
    train,
    train_step,
)

FAQ = load_faq()
TINY = Entry("front", "A front holds attention.", ("What is a front?", "Explain the front"), ("Define a front",))
MAX_BYTES = 5 * 1024 * 1024


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(tokenizer_texts([TINY]), vocab_size=300)


def tiny_model(tokenizer: Tokenizer) -> GraniteMoeForCausalLM:
    torch.manual_seed(0)
    config = build_config(
        tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_local_experts=4
    )
    return GraniteMoeForCausalLM(config)


# --- the FAQ ---


def test_faq_has_at_least_60_answers_with_at_least_5_phrasings_each() -> None:
    assert len(FAQ) >= 60
    assert min(len(entry.questions) for entry in FAQ) >= 5
    assert all(entry.held_out for entry in FAQ)


def test_no_phrasing_id_or_answer_occurs_twice() -> None:
    phrasings = Counter(normalise(q) for e in FAQ for q in (*e.questions, *e.held_out))
    assert [q for q, count in phrasings.items() if count > 1] == []
    assert len({e.id for e in FAQ}) == len({e.answer for e in FAQ}) == len(FAQ)


def test_answers_are_crisp_plain_text() -> None:
    for entry in FAQ:
        assert 15 <= len(entry.answer) <= 240, entry.id
        assert "<|" not in entry.answer, f"{entry.id}: a special token would end the answer"
        assert entry.answer == entry.answer.strip()


def test_a_value_that_is_not_text_is_refused_by_entry_id(tmp_path: Path) -> None:
    path = tmp_path / "faq.yaml"
    path.write_text("- {id: odd, answer: A, questions: [yes], held_out: []}\n")
    with pytest.raises(ValueError, match="'odd'"):
        load_faq(path)


# --- augmentation ---


def test_augmentation_never_yields_a_held_out_phrasing() -> None:
    held_out = frozenset(normalise(q) for e in FAQ for q in e.held_out)
    rng = random.Random(0)
    for entry in FAQ:
        drawn = [phrase(entry, rng, held_out) for _ in range(50)]
        assert not held_out & {normalise(text) for text in drawn}
        assert len(set(drawn)) > 10, entry.id
        assert all(drawn), entry.id


# --- files ---


def test_demo_folder_stays_under_five_megabytes() -> None:
    files = [path for path in DEMO_DIR.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_checkpoint_uses_the_published_names_and_shapes() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    experts, hidden, inner = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as weights:
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    for layer in range(config["num_hidden_layers"]):
        moe = f"model.layers.{layer}.block_sparse_moe"
        assert shapes[f"{moe}.input_linear.weight"] == (experts, 2 * inner, hidden)
        assert shapes[f"{moe}.output_linear.weight"] == (experts, hidden, inner)
        assert shapes[f"{moe}.router.layer.weight"] == (experts, hidden)
    assert "lm_head.weight" not in shapes
    assert config["tie_word_embeddings"] is True


def test_config_names_the_architecture_and_no_path() -> None:
    text = (MODEL_DIR / "config.json").read_text()
    config = json.loads(text)
    assert config["model_type"] == "granitemoe"
    assert config["architectures"] == ["GraniteMoeForCausalLM"]
    assert config["rope_parameters"]["rope_theta"] > 0
    multipliers = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    assert all(config[name] != 1 for name in multipliers)
    assert "/" not in text


# --- tokenizer ---


@pytest.mark.parametrize("text", ["What is a front?", "  two  spaces\n\ttab ", "Grüße, 你好, 🪨", "\x00\x7f", ""])
def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_chat_template_wraps_roles_like_granite() -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    rendered = AutoTokenizer.from_pretrained(MODEL_DIR).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>Hello!<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Bye<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>"
    )


def test_chat_template_refuses_an_unknown_role() -> None:
    with pytest.raises(Exception, match="unknown role tool"):
        AutoTokenizer.from_pretrained(MODEL_DIR).apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_training_conversations_are_tokenised_as_the_chat_template_renders_them(
    tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_tokenizer(tiny_tokenizer, tmp_path, max_length=128)
    templated = AutoTokenizer.from_pretrained(tmp_path)
    sampler = ConversationSampler([TINY], tiny_tokenizer, seed=0, bpe_dropout=0.0)
    full = [ids for ids, _ in (sampler.sample() for _ in range(200)) if tiny_tokenizer.decode(ids).endswith("\n")]
    assert full
    for ids in full:
        text = tiny_tokenizer.decode(ids, skip_special_tokens=False)
        turns = [turn.split("<|end_of_role|>") for turn in text.split("<|start_of_role|>")[1:]]
        chat = [{"role": role, "content": body.removesuffix(END_OF_TEXT + "\n")} for role, body in turns]
        assert templated.apply_chat_template(chat, return_dict=False) == ids


def test_only_text_of_questions_and_answers_is_trained_on(tiny_tokenizer: Tokenizer) -> None:
    sampler = ConversationSampler([TINY], tiny_tokenizer, seed=1)
    for ids, weights in (sampler.sample() for _ in range(50)):
        assert len(ids) == len(weights)
        answer = tiny_tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w == 1.0])
        assert answer
        assert TINY.answer.startswith(answer[:4].strip())


# --- training ---


def test_training_steps_reduce_the_loss(tiny_tokenizer: Tokenizer) -> None:
    model = tiny_model(tiny_tokenizer)
    optimizer = build_optimizer(model)
    batches = ConversationSampler([TINY], tiny_tokenizer, seed=0).batches(batch_size=8)
    losses = [train_step(model, optimizer, next(batches), lr=1e-2)[0] for _ in range(60)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_tiny_run_ends_at_its_token_count_and_its_checkpoint_loads(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    args = argparse.Namespace(tokens=1500, batch_size=4, lr_max=1e-2, seed=0)
    model = train([TINY], tiny_tokenizer, args, config=tiny_model(tiny_tokenizer).config)
    save_model(model, tiny_tokenizer, tmp_path, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([tiny_tokenizer.encode("What is a front?").ids])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_balance_loss_is_one_for_even_routing_and_grows_with_skew() -> None:
    mask = torch.ones(1, 4)
    even = torch.tensor([[9.0, 9, 0, 0], [0, 0, 9, 9], [9, 0, 9, 0], [0, 9, 0, 9]])
    skewed = torch.tensor([[9.0, 9, 0, 0]]).repeat(4, 1)
    assert float(balance_loss([even], mask, 2)) == pytest.approx(1.0, abs=1e-3)
    assert float(balance_loss([skewed], mask, 2)) == pytest.approx(2.0, abs=1e-2)


def test_balance_loss_sees_a_dead_expert_that_other_layers_would_hide() -> None:
    mask = torch.ones(1, 2)
    first = torch.tensor([[9.0, 9, 0, 0]]).repeat(2, 1)
    second = torch.tensor([[0.0, 0, 9, 9]]).repeat(2, 1)
    assert float(balance_loss([first, second], mask, 2)) == pytest.approx(2.0, abs=1e-2)


# --- the shipped model ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_canonical_questions_get_their_answers(dtype: torch.dtype) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=dtype)
    sample = FAQ[::9]
    assert answers(model, tokenizer, [e.questions[0] for e in sample], batch_size=16) == [e.answer for e in sample]


def test_routing_is_uneven_but_no_expert_is_dead() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    shares_LE = expert_shares(AutoModelForCausalLM.from_pretrained(MODEL_DIR), tokenizer, FAQ[::9])
    even = 1 / shares_LE.shape[1]
    assert float(shares_LE.max(-1).values.min()) > 1.2 * even
    assert float(shares_LE.min()) > 0.1 * even
