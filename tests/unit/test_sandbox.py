"""Processes for chat templates: one that takes too much is stopped, and one that is lost loses no request."""

import asyncio
import os
import signal
from asyncio.subprocess import Process

import pytest

from cluster.errors import ModelError
from deploy.ingress import sandbox as sandbox_module
from deploy.ingress.sandbox import Sandbox, SandboxError, rendering
from deploy.ingress.text.chat_template import ChatTemplate

FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TOO_MUCH = {
    "loops": (FOREVER, "of a processor"),
    "macro": (
        "{% macro m(n) %}{% for i in range(9) %}{{ m(n + 1) if n < 99 }}{% endfor %}{% endmacro %}{{ m(0) }}",
        "of a processor",
    ),
    "power": ("{% set n = messages | length + 8 %}{{ (n ** (n ** n)) % 7 }}", "of a processor"),
    "text": ("{{ messages[0].content * 10 ** 12 }}", "OverflowError|MemoryError|memory"),
    "filter": ("{{ messages[0].content | center(10 ** 11) }}", "MemoryError|memory"),
    "join": ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "characters"),
    "list": (
        "{% set ns = namespace(a=[0]) %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "Memory|of a processor",
    ),
}


async def render(sandbox: Sandbox, content: str) -> str:
    return (await sandbox.render(rendering([{"role": "user", "content": content}]))).decode()


class TestTemplatesAreStopped:
    @pytest.mark.parametrize("name", TOO_MUCH)
    async def test_whatever_they_do(self, name: str) -> None:
        source, told = TOO_MUCH[name]
        sandbox = Sandbox("messages", ChatTemplate(source, {}).arguments(), cpu_s=0.5)
        work = render(sandbox, "hi")
        with pytest.raises(SandboxError, match=f"messages.*({told})"):
            await work
        await sandbox.close()

    @pytest.mark.parametrize("source", ["{{ 9 ** (9 ** 9) % 7 }}", "{{ 'x' | nofilter }}"])
    async def test_while_they_are_compiled(self, source: str) -> None:
        sandbox = Sandbox("the template", ChatTemplate(source, {}).arguments(), cpu_s=0.5)
        with pytest.raises(ModelError, match="template"):
            await sandbox.warm_up()

    async def test_others_go_on(self) -> None:
        source = "{% if messages[0].content == 'forever' %}" + FOREVER + "{% endif %}{{ messages[0].content }}"
        sandbox = Sandbox("messages", ChatTemplate(source, {}).arguments())
        await sandbox.warm_up()
        await sandbox.warm_up()
        hanging = asyncio.create_task(render(sandbox, "forever"))
        for text in ("a", "naïve 東京 😀", "c" * 300_000):
            assert await render(sandbox, text) == text
            assert not hanging.done()
        with pytest.raises(SandboxError):
            await hanging
        assert await render(sandbox, "afterwards") == "afterwards"
        await sandbox.close()

    async def test_who_leaves_takes_the_answer_along(self) -> None:
        sandbox = Sandbox("messages", ChatTemplate("{{ messages[0].content }}", {}).arguments())
        await sandbox.warm_up()
        for text in ("a", "b", "c"):
            leaver = asyncio.create_task(render(sandbox, "left"))
            await asyncio.sleep(0)
            leaver.cancel()
            assert await render(sandbox, text) == text
        await sandbox.close()

    async def test_a_process_that_ended_unasked_is_replaced(self) -> None:
        sandbox = Sandbox("messages", ChatTemplate("{{ messages[0].content }}", {}).arguments())
        await sandbox.warm_up()
        [process] = sandbox._idle
        process.kill()
        await process.wait()
        assert await render(sandbox, "a") == "a"
        await sandbox.close()

    @pytest.mark.parametrize("when", ["idle", "at work", "frozen"])
    async def test_a_process_that_is_lost_loses_no_request(self, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
        sandbox = Sandbox("messages", ChatTemplate("{{ messages[0].content }}", {}).arguments())
        await sandbox.warm_up()
        [process] = sandbox._idle
        # One that is stopped is at work for as long as it takes to kill it.
        os.kill(process.pid, signal.SIGKILL if when == "idle" else signal.SIGSTOP)
        monkeypatch.setattr(sandbox_module, "ANSWER_S", 0.1 if when == "frozen" else 20.0)
        start = sandbox._start

        async def start_another() -> Process:
            monkeypatch.setattr(sandbox_module, "ANSWER_S", 20.0)
            return await start()

        monkeypatch.setattr(sandbox, "_start", start_another)
        rendering = asyncio.create_task(render(sandbox, "a"))
        while sandbox._idle:
            await asyncio.sleep(0)
        if when == "at work":
            os.kill(process.pid, signal.SIGKILL)
        assert await rendering == "a"
        assert [another.pid for another in sandbox._idle] != [process.pid]
        await sandbox.close()

    async def test_what_ends_every_process_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sandbox = Sandbox("messages", ChatTemplate("{{ messages[0].content }}", {}).arguments())
        start, started = sandbox._start, list[Process]()

        async def start_and_kill() -> Process:
            started.append(await start())
            os.kill(started[-1].pid, signal.SIGKILL)
            return started[-1]

        monkeypatch.setattr(sandbox, "_start", start_and_kill)
        with pytest.raises(SandboxError, match="messages has ended its process with code -9"):
            await render(sandbox, "a")
        assert len(started) == 2

    async def test_templates_know_no_secret(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OUTCROP_API_KEY", "secret")
        sandbox = Sandbox("messages", ChatTemplate("x", {}).arguments())
        await sandbox.warm_up()
        [process] = sandbox._idle
        with open(f"/proc/{process.pid}/environ") as environ:
            assert "secret" not in environ.read()
        await sandbox.close()
