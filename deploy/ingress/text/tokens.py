"""Text to tokens and back: tokenizer and incremental detokenisation. Knows no engine and no HTTP."""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from cluster.errors import ModelError
from cluster.models.files import read_file, read_json
from deploy.ingress.text.chat_template import ChatTemplate, ChatTemplateError, load_chat_template

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NO_TEMPLATE = "messages: this model has no chat template: use /v1/completions, or set chat_template to a Jinja file"
# Characters or tokens that take a fraction of a millisecond: less than a batch costs.
SHORT = 500
# The largest vocabularies take 40 MiB.
MAX_TOKENIZER_BYTES = 256 * 2**20
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# A UTF-8 character has at most 4 bytes, so its beginning lies within the last 4 tokens; a few more cost nothing.
CONTEXT_TOKENS = 8


class TooManyTokens(ValueError):  # noqa: N818 - the text's fault
    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"{num_tokens} tokens")
        self.num_tokens = num_tokens


class Tokenizer:
    """tokenizer.json and the chat template of a checkpoint. tokenizer.json alone decides how text is split."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        # In characters of its spelling, which is never shorter than the text it stands for.
        self.longest_token = max(map(len, backend.get_vocab()), default=1)
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self.template = template
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, model_dir: Path, chat_template: str | None = None) -> "Tokenizer":
        """Read a directory in Hugging Face layout. `chat_template` is a Jinja file that replaces the checkpoint's,
        or "none". Raises ModelError.
        """
        path = model_dir / "tokenizer.json"
        if not path.exists():
            raise ModelError(
                f"{path} is missing: Outcrop needs a fast tokenizer; write one with transformers' "
                "AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(read_file(path, MAX_TOKENIZER_BYTES))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{path} can't be read: {error}") from None
        special_tokens = _special_tokens(model_dir)
        return cls(backend, special_tokens, load_chat_template(model_dir, special_tokens, chat_template))

    def encode(self, text: str, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        """Raises TooManyTokens where there are more than `most`: listing millions of them would take long."""
        if len(text) < SHORT:
            found = self.backend.encode(text, add_special_tokens=add_special_tokens)
        else:  # a batch lets go of the interpreter's lock, so that in a thread it holds up nobody
            [found] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        if most is not None and len(found) > most:
            raise TooManyTokens(len(found))
        return found.ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if len(ids) < SHORT:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]

    def id_to_token(self, token_id: int) -> str:
        """The token as the vocabulary spells it; "" for an id that only pads the model's vocabulary."""
        return self.backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, as UTF-8; it may begin or end inside a character."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(self.id_to_token(token_id))
        return found

    def token_text(self, token_id: int) -> str:
        """A token as log-probabilities show it: its text, or as OpenAI `bytes:\\xe2\\x82` if it splits a character."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def is_byte_token(self, token_id: int) -> bool:
        """Whether it is a byte token of a SentencePiece vocabulary, such as <0xE2>."""
        return not self.is_byte_level and BYTE_TOKEN.fullmatch(self.id_to_token(token_id)) is not None

    @property
    def has_chat_template(self) -> bool:
        return self.template is not None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt for a conversation; encode it with add_special_tokens=False. Raises ChatTemplateError.

        In this process, for as long as it takes: a server renders in a sandbox.
        """
        if self.template is None:
            raise ChatTemplateError(NO_TEMPLATE)
        return self.template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
        )

    def _spell(self, token: str) -> bytes:
        if self.is_byte_level:
            table = _byte_of_char()
            # As tokenizers' ByteLevel decoder: a token with a character outside the table stands for itself.
            return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()


class IncrementalDetokenizer:
    """Token ids in, text out as soon as it is certain.

    No delta holds a part of a character. Deltas and the final flush joined are what decode() gives for all tokens
    at once; after `prompt_ids` they are what the output adds to the prompt's text (so a leading space stays, and
    a character that the prompt began is completed).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        shown: Iterable[str] = (),
    ) -> None:
        """`shown`: special tokens that are not skipped all the same."""
        kept = frozenset(tokenizer.backend.token_to_id(token) for token in shown)
        self._skipped = tokenizer.special_ids - kept if skip_special_tokens else frozenset[int]()
        context = [i for i in prompt_ids[-CONTEXT_TOKENS:] if i not in self._skipped]
        kind = _ByteDecoder if tokenizer.is_byte_level else _WindowDecoder
        self._decoder: _ByteDecoder | _WindowDecoder = kind(tokenizer, context)

    def feed(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._decoder.step(token_id)

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD. Call it once."""
        return self._decoder.flush()


class _ByteDecoder:
    """Byte-level BPE (GPT-2, Granite): tokens are bytes, and the codec keeps an unfinished character.

    tokenizers' DecodeStream is not used: it holds everything behind a byte that is no UTF-8, and can't be flushed.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._codec = codecs.getincrementaldecoder("utf-8")("replace")
        self._codec.decode(b"".join(map(self._bytes_of, context)))

    def step(self, token_id: int) -> str:
        return self._codec.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._codec.decode(b"", final=True)


class _WindowDecoder:
    """Any other decoder: a token's text is what decoding it behind the token before it adds.

    A run of byte tokens is decoded as a whole (one bad byte spoils it all), so it is held until it ends.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(context)
        self._shown = len(tokenizer.decode(self._window, skip_special_tokens=False))

    def step(self, token_id: int) -> str:
        self._window.append(token_id)
        return "" if self._tokenizer.is_byte_token(token_id) else self.flush()

    def flush(self) -> str:
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        delta = text[self._shown :]
        self._window = self._window[-1:]
        self._shown = len(self._tokenizer.decode(self._window, skip_special_tokens=False))
        return delta


def _special_tokens(model_dir: Path) -> dict[str, str]:
    """bos_token and its kin by name; tokenizer_config.json wins over the older special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_json(model_dir / name) if (model_dir / name).exists() else {}
        for key in NAMED_TOKENS:
            value = content.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[key] = value
    return found


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable spelling of bytes: printable Latin-1 as itself, the other bytes from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
