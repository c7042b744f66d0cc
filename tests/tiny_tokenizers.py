"""Small tokenizers of the kinds that checkpoints bring, trained on a few lines in milliseconds."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")
TEXTS = (
    "Hello world, this is a small corpus: the quick brown fox jumps over the lazy dog. Hello world again!",
    "Grüße aus München, naïve café — 東京都 と 大阪, emoji 😀👩‍👩‍👧, Ελληνικά, русский язык.",
    "def main():\n    return {'a': 1, \"b\": [2, 3]}\n\n\t# comment   with   spaces\n",
)


def byte_level() -> Tokenizer:
    """As GPT-2 and Granite: every byte has a token, some tokens are words. The last added token is no special one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("one two", normalized=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2: words begin with U+2581, unknown characters become <0xNN> tokens."""
    words = ["\u2581", "h", "e", "l", "o", "w", "r", "d", "\u2581h", "\u2581he", "ll", "\u2581w", "or", "\u2581hello"]
    vocab = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>"])}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *words]:
        vocab[token] = len(vocab)
    merges = [("\u2581", "h"), ("\u2581h", "e"), ("l", "l"), ("\u2581", "w"), ("o", "r")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5 and other SentencePiece unigram models."""
    pieces = [("<unk>", 0.0), *((piece, -2.0) for piece in ("\u2581", "\u2581hello", "\u2581world", *"helowrd"))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "metaspace": metaspace}


def write(tokenizer: Tokenizer, directory: Path, chat_template: object = None, **config: object) -> Path:
    """A directory in Hugging Face layout with this tokenizer, as AutoTokenizer reads it."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": SPECIAL[0], "special": True, "__type": "AddedToken"},
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
        "clean_up_tokenization_spaces": False,
    } | config
    if chat_template is not None:
        settings["chat_template"] = chat_template
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def splits(text: str, cuts: list[int]) -> Iterator[str]:
    """`text` in deltas, cut at these places."""
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(places):
        yield text[start:end]
