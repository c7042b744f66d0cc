"""Requests and answers that are long: what takes long for them is done where it holds up nobody."""

import asyncio
import json
import threading
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.ingress import api
from deploy.ingress import service as service_module
from deploy.ingress import work as work_module
from deploy.ingress.openai import sampling
from deploy.ingress.openai.requests import CompletionRequest, TokenizeRequest
from deploy.ingress.service import Service
from tests.unit.fake_supervisor import COMPLETIONS, JSON, Open


async def turns_during(work: Awaitable[Any]) -> tuple[Any, int]:
    """The result, and how often the event loop came round meanwhile."""
    turns, task = 0, asyncio.ensure_future(work)
    while not task.done():
        turns += 1
        await asyncio.sleep(0.001)
    return task.result(), turns


IDS = {"tokens": list(range(10)) * 250_000}
LARGE = {
    "ids": ("/detokenize", IDS, "tokens", "max_model_len"),
    "prompt ids": (COMPLETIONS, {"prompt": IDS["tokens"]}, "prompt", "maximum context length"),
    "fields": (COMPLETIONS, {str(n): n for n in range(500_000)}, None, "fields"),
    "objects": (COMPLETIONS, {"prompt": [{}] * 1_000_000}, None, "more than 10000"),
    "lists": (COMPLETIONS, {"prompt": [[1] * 1000] * 900}, "prompt", "900 choices"),
    "key": (COMPLETIONS, {"k" * 700_000: [1] * 700_000}, None, "a key of 700000 characters"),
    "long numbers": (COMPLETIONS, {"prompt": [10**4000] * 1500}, "prompt", "must be a string"),
}


# No module: the service's tokenizer.
THREADED: dict[str, tuple[str, Any, Any, str]] = {
    "prompts": (COMPLETIONS, {"prompt": ["x" * 80] * 16}, None, "encode"),
    "messages": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}] * 20},
        work_module,
        "rendering",
    ),
    "an answer": ("/detokenize", {"tokens": [5] * 1000}, api, "dump"),
}


def threads_of(monkeypatch: pytest.MonkeyPatch, owner: Any, function: str) -> list[str]:
    """In which it is called from now on."""
    threads, real = list[str](), getattr(owner, function)

    def call(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return real(*args, **options)

    monkeypatch.setattr(owner, function, call)
    return threads


class TestNobodyWaits:
    """Counts turns of the event loop, not time: a call that holds the interpreter's lock leaves it two or three."""

    @pytest.mark.parametrize("name", LARGE)
    async def test_for_large_bodies(self, open_api: Open, name: str) -> None:
        path, body, param, told = LARGE[name]
        content = json.dumps(body, separators=(",", ":")).encode()
        assert 2**20 < len(content) < 8 * 2**20
        http = await open_api()
        answer, turns = await turns_during(http.post(path, content=content, headers=JSON))
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param)
        assert told in error["message"]
        assert turns > 8

    @pytest.mark.parametrize("work", ["encode", "decode"])
    async def test_for_long_texts(self, open_api: Open, work: str) -> None:
        http = await open_api()
        service: Service = http.service  # type: ignore[attr-defined]
        text = "The quick brown fox jumps over the lazy dog. " * 20_000
        ids = service.tokenizer.encode(text)
        arguments = {"encode": lambda: service.tokenizer.encode(text), "decode": lambda: service.tokenizer.decode(ids)}
        result, turns = await turns_during(service.work.run(len(ids), arguments[work]))
        assert result == {"encode": ids, "decode": text}[work]
        assert turns > 8

    @pytest.mark.parametrize("name", THREADED)
    async def test_what_is_long_altogether_is_done_in_threads(
        self, open_api: Open, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        path, body, module, function = THREADED[name]
        monkeypatch.setattr(work_module, "LONG", 1000)
        http = await open_api()
        threads = threads_of(monkeypatch, module or http.service.tokenizer, function)  # type: ignore[attr-defined]
        await http.post(path, json=body)
        assert threads
        assert all(thread.startswith("requests") for thread in threads)

    async def test_more_tokens_than_fit_are_not_listed(self, open_api: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        class Encoding:
            def __len__(self) -> int:
                return 3000

        http = await open_api()
        backend = SimpleNamespace(encode_batch_fast=lambda *_, **__: [Encoding()])
        monkeypatch.setattr(http.service.tokenizer, "backend", backend)  # type: ignore[attr-defined]
        error = (await http.post(COMPLETIONS, json={"prompt": "x" * 3000})).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert "3000 in the prompt" in error["message"]

    @pytest.mark.parametrize(
        ("module", "function", "times"), [(service_module, "spell_prompt", 2), (sampling, "check_token_ids", 4)]
    )
    async def test_prompts_are_gone_through_once_for_all_choices(
        self, open_api: Open, monkeypatch: pytest.MonkeyPatch, module: Any, function: str, times: int
    ) -> None:
        """Four token ids' worth of checks: two prompts, stop_token_ids and logit_bias."""
        http = await open_api()
        threads = threads_of(monkeypatch, module, function)
        assert (await http.post(COMPLETIONS, json={"prompt": [[1], [2]], "n": 8, "echo": True})).status_code == 503
        assert len(threads) == times

    async def test_a_large_body_means_what_it_says(self, open_api: Open) -> None:
        """Read in pieces as at once: nested lists, odd characters, numbers of any size."""
        service: Service = (await open_api()).service  # type: ignore[attr-defined]
        prompts = [list(range(50_000)), [2**70], [7] * 60_000]
        found = await service.work.parse(json.dumps({"prompt": prompts, "n": 1}).encode(), CompletionRequest)
        assert found.prompt == prompts
        texts = ['naïve 東京 😀 \u2028\0"\\'] * 30_000
        found = await service.work.parse(json.dumps({"prompt": texts}, ensure_ascii=False).encode(), CompletionRequest)
        assert found.prompt == texts
        messages = [{"role": "user", "content": [{"type": "text", "text": "x" * 300_000}] * 2}]
        read = await service.work.parse(json.dumps({"messages": messages}).encode(), TokenizeRequest)
        assert read.messages is not None
        assert len(read.messages[0].content) == 600_001
