"""Tokens to text: what streams out in pieces is what decoding and cutting the whole would give."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cluster.errors import ModelError
from deploy.ingress.text.stop_strings import StopChecker
from deploy.ingress.text.tokens import IncrementalDetokenizer, Tokenizer
from tests import tiny_tokenizers

TOKENIZERS = {name: Tokenizer(build()) for name, build in tiny_tokenizers.KINDS.items()}
BYTE_LEVEL = TOKENIZERS["byte_level"]
TEXTS = [
    "Hello world",
    " leading space",
    "tabs\tand\nnewlines\n\n",
    "😀 👩‍👩‍👧 é",
    "<|start_of_role|>user<|end_of_role|>x",
    "one two three",
    "",
]


def stream(tokenizer: Tokenizer, ids: list[int], **options: object) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)  # type: ignore[arg-type]
    return [*(detokenizer.feed(i) for i in ids), detokenizer.flush()]


def byte_tokens(raw: bytes) -> list[int]:
    spelled = {BYTE_LEVEL.token_bytes(i): i for i in range(BYTE_LEVEL.vocab_size)}
    return [spelled[bytes([byte])] for byte in raw]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizers.write(tiny_tokenizers.byte_level(), tmp_path_factory.mktemp("model"))


class TestTokenizer:
    @pytest.mark.parametrize("text", TEXTS)
    def test_agrees_with_transformers(self, model_dir: Path, text: str) -> None:
        ours, theirs = Tokenizer.load(model_dir), AutoTokenizer.from_pretrained(model_dir)
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert [ours.id_to_token(i) for i in ids] == theirs.convert_ids_to_tokens(ids)
        assert ours.special_tokens == {k: v for k, v in theirs.special_tokens_map.items() if k != "unk_token"}
        assert ours.vocab_size == len(theirs)

    @pytest.mark.parametrize("text", [text for text in TEXTS if "one two" not in text])
    def test_token_bytes_joined_are_the_text(self, text: str) -> None:
        assert b"".join(BYTE_LEVEL.token_bytes(i) for i in BYTE_LEVEL.encode(text)) == text.encode()

    def test_token_bytes_of_sentencepiece_vocabularies(self) -> None:
        tokenizer = TOKENIZERS["byte_fallback"]
        ids = tokenizer.encode("hello €", add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == " hello €".encode()

    def test_token_text_shows_bytes_that_are_no_character(self) -> None:
        texts = {BYTE_LEVEL.token_text(i) for i in range(BYTE_LEVEL.vocab_size)}
        assert len(texts) == BYTE_LEVEL.vocab_size, "two tokens with one name would collide in top_logprobs"
        assert {"bytes:\\xf0", " world", "<|end_of_text|>"} <= texts

    def test_an_id_beyond_the_vocabulary_has_no_text(self) -> None:
        assert BYTE_LEVEL.id_to_token(10_000) == ""
        assert BYTE_LEVEL.token_bytes(10_000) == b""
        assert stream(BYTE_LEVEL, [10_000]) == ["", ""]

    def test_truncation_in_tokenizer_json_is_ignored(self, tmp_path: Path) -> None:
        backend = tiny_tokenizers.byte_level()
        backend.enable_truncation(2)
        backend.enable_padding(length=50)
        tiny_tokenizers.write(backend, tmp_path)
        assert len(Tokenizer.load(tmp_path).encode("Hello world, this is longer")) not in (2, 50)

    def test_special_tokens_map_is_read_and_the_config_wins(self, tmp_path: Path) -> None:
        tiny_tokenizers.write(tiny_tokenizers.byte_level(), tmp_path)
        (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|old|>", "unk_token": {"content": "<|u|>"}}')
        assert Tokenizer.load(tmp_path).special_tokens["eos_token"] == tiny_tokenizers.SPECIAL[0]
        assert Tokenizer.load(tmp_path).special_tokens["unk_token"] == "<|u|>"

    def test_missing_or_broken_files_say_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"tokenizer\.json is missing.*save_pretrained"):
            Tokenizer.load(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ModelError, match=r"tokenizer\.json can't be read"):
            Tokenizer.load(tmp_path)


class TestIncrementalDetokenizer:
    @pytest.mark.parametrize("kind", TOKENIZERS)
    @given(data=st.data(), skip=st.booleans())
    def test_deltas_joined_are_the_decoded_whole(self, kind: str, data: st.DataObject, skip: bool) -> None:
        tokenizer = TOKENIZERS[kind]
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
        assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip)

    @given(text=st.text(max_size=40))
    def test_no_delta_holds_part_of_a_character(self, text: str) -> None:
        deltas = stream(BYTE_LEVEL, BYTE_LEVEL.encode(text), skip_special_tokens=False)
        if "one two" not in text:
            assert "".join(deltas) == text
            assert "\ufffd" not in "".join(deltas) or "\ufffd" in text

    def test_an_unfinished_character_appears_at_the_end_only(self) -> None:
        assert stream(BYTE_LEVEL, byte_tokens(b"\xf0\x9f")) == ["", "", "\ufffd"]

    @pytest.mark.parametrize("kind", TOKENIZERS)
    @given(data=st.data())
    def test_output_behind_a_prompt_is_what_it_adds(self, kind: str, data: st.DataObject) -> None:
        tokenizer = TOKENIZERS[kind]
        # Byte tokens of SentencePiece change the text before them; a prompt that ends in one is left out here.
        plain = [i for i in range(tokenizer.vocab_size) if not tokenizer.is_byte_token(i)]
        prompt = data.draw(st.lists(st.sampled_from(plain), max_size=12))
        output = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
        whole = tokenizer.decode(prompt + output)
        added = "".join(stream(tokenizer, output, prompt_ids=prompt))
        assert whole.endswith(added)
        shown = tokenizer.decode(prompt)
        assert whole[: len(whole) - len(added)] == shown or shown.endswith("\ufffd")

    def test_a_space_at_the_start_of_the_output_stays(self) -> None:
        tokenizer = TOKENIZERS["byte_fallback"]
        prompt = tokenizer.encode("hello", add_special_tokens=False)
        world = tokenizer.encode("world", add_special_tokens=False)
        assert "".join(stream(tokenizer, world)) == "world"
        assert "".join(stream(tokenizer, world, prompt_ids=prompt)) == " world"

    def test_a_character_that_the_prompt_begins_is_completed(self) -> None:
        first, *rest = byte_tokens("€".encode())
        assert stream(BYTE_LEVEL, rest, prompt_ids=[*BYTE_LEVEL.encode("a"), first]) == ["", "€", ""]


class SlowStopChecker(StopChecker):
    """Tries every length of every stop string."""

    def __init__(self, stop: list[str], include_stop: bool = False) -> None:
        super().__init__(stop, include_stop)
        self.stop = stop

    def feed(self, delta: str) -> str:
        if self.matched is not None:
            return ""
        text = self._held + delta
        found = [(at + len(stop), at, stop) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include_stop else start]
        ends = (n for stop in self.stop for n in range(len(stop)) if text.endswith(stop[:n]))
        shown = len(text) - max(ends, default=0)
        self._held = text[shown:]
        return text[:shown]


class TestStopChecker:
    def cut(self, deltas: list[str], stop: list[str], include: bool = False) -> tuple[str, str | None]:
        checker = StopChecker(stop, include)
        shown = "".join(map(checker.feed, deltas)) + checker.flush()
        return shown, checker.matched

    @given(
        text=st.text("ab\n€", max_size=24),
        stop=st.lists(st.text("ab\n€", min_size=1, max_size=5), max_size=3),
        cuts=st.lists(st.integers(0, 30)),
        include=st.booleans(),
    )
    @example(text="abc", stop=["abc", "b"], cuts=[2], include=False)
    def test_any_split_gives_the_same_output(self, text: str, stop: list[str], cuts: list[int], include: bool) -> None:
        deltas = list(tiny_tokenizers.splits(text, cuts))
        assert self.cut(deltas, stop, include) == self.cut([text], stop, include)

    @given(
        text=st.text("ab", max_size=16), stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)
    )
    def test_cuts_where_the_first_stop_string_is_complete(self, text: str, stop: list[str]) -> None:
        ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
        shown, matched = self.cut([text], stop)
        if not ends:
            assert (shown, matched) == (text, None)
        else:
            longest = max((s for s in stop if text[: ends[0]].endswith(s)), key=len)
            assert (shown, matched) == (text[: ends[0] - len(longest)], longest)

    @given(
        deltas=st.lists(st.text("ab", max_size=6), max_size=12),
        stop=st.lists(st.text("ab", min_size=1, max_size=8), max_size=4, unique=True),
        include=st.booleans(),
    )
    @example(deltas=["a" * 30, "b"], stop=["a" * 8 + "b", "ab" * 4, "aab"], include=False)
    def test_each_delta_is_as_from_a_slow_search(self, deltas: list[str], stop: list[str], include: bool) -> None:
        fast, slow = StopChecker(stop, include), SlowStopChecker(stop, include)
        for delta in deltas:
            assert (fast.feed(delta), fast.matched) == (slow.feed(delta), slow.matched)
        assert fast.flush() == slow.flush()

    def test_long_stop_strings_take_no_longer(self) -> None:
        """Counts looks into them, for a text that is held as long as possible and might end with any of them."""
        looks = 0

        class Word(str):
            def __getitem__(self, at: Any) -> str:
                nonlocal looks
                looks += 1
                return str.__getitem__(self, at)

        words = [
            "a" * 1000,
            *(f"{letter}c{'a' * 998}" for letter in "bdefghij"),
            *("a" * 500 + n + "a" * 99 for n in "xyz"),
        ]
        checker = StopChecker([Word(word) for word in words])
        for character in "a" * 900:
            checker.feed(character)
        assert checker.flush() == "a" * 900
        assert looks < 900 * len(words) * 10

    @given(text=st.text("ab", max_size=16), stop=st.text("ab", min_size=1, max_size=4))
    def test_text_that_can_not_become_a_stop_string_is_not_held(self, text: str, stop: str) -> None:
        checker = StopChecker([stop])
        shown = "".join(map(checker.feed, text))
        if checker.matched is None:
            held = text[len(shown) :]
            assert stop.startswith(held)
            assert len(held) < len(stop)

    def test_nothing_follows_a_match(self) -> None:
        checker = StopChecker(["\n\n"], include_stop=True)
        assert [checker.feed(delta) for delta in ("a\n", "\nb", "c")] == ["a", "\n\n", ""]
        assert (checker.flush(), checker.matched) == ("", "\n\n")

    def test_without_stop_strings_text_passes(self) -> None:
        assert self.cut(["a", "", "b"], []) == ("ab", None)


def test_the_ingress_side_imports_no_torch_transformers_or_ray() -> None:
    code = (
        "import sys, deploy.ingress.text.tokens\n"
        "from deploy.ingress.openai import parsing, responses, sampling\n"
        "print([m for m in ('torch', 'transformers', 'ray', 'actors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
