"""Processes beside this one, for work that can't be bounded in any other way: a checkpoint's chat template, which is a
program, grammars of requests, and bodies so large that reading them would hold up everyone's streams. What takes too
much time or memory ends with its process, and only who asked for it waits for it.

They know no secret: they get few variables of our environment, and what they work on through a pipe.
"""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import ModelError
from deploy.ingress.openai.answer_json import dump
from deploy.ingress.openai.errors import invalid_request, overloaded
from deploy.ingress.sandbox_main import GRAMMAR, READ, RENDER, SET_UP, TOKENIZER

T = TypeVar("T")

MAX_PROCESSES = 4
# Of a processor, not of the clock: a busy machine refuses nobody.
CPU_S = 2.0
# For a place among these processes, and for an answer: a process ends by itself long before, unless it is frozen.
PLACE_S = 10.0
ANSWER_S = 20.0
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "TZ")


class SandboxError(Exception):
    """What was asked for is refused, or takes too much. `param` and `code` as in APIError."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class _LostError(SandboxError):
    """A process has not answered. That may be because of what it was asked, or of something else."""


class SandboxBusy(Exception):  # noqa: N818 - an answer, not a failure
    """No place became free in time."""


def rendering(messages: list[dict[str, Any]], **options: Any) -> bytes:
    """The arguments of ChatTemplate.render() for a sandbox. Takes as long as the messages are."""
    return RENDER + dump({"messages": messages} | options)


class Sandbox:
    """Processes that are started when they are needed, and kept. They end with this one.

    `what` names the work in errors; `template` holds the arguments of ChatTemplate, `model_dir` has the tokenizer that
    grammars are for; `cpu_s` is the time of a processor that one piece of work may take.
    """

    def __init__(
        self,
        what: str,
        template: dict[str, Any] | None = None,
        cpu_s: float = CPU_S,
        model_dir: Path | None = None,
    ) -> None:
        self._what = what
        self._cpu_s = cpu_s
        self._set_up = None if template is None else SET_UP + dump(template)
        if model_dir is not None:
            self._set_up = TOKENIZER + dump({"model_dir": str(model_dir)})
        self._places = asyncio.Semaphore(MAX_PROCESSES)
        self._idle: list[Process] = []
        self._tasks: set[asyncio.Task[list[bytes]]] = set()

    async def render(self, request: bytes) -> bytes:
        """ChatTemplate.render(), asked for by rendering(): UTF-8. Raises SandboxError or SandboxBusy."""
        [text] = await self._ask(request)
        return text

    async def grammar(self, request: bytes) -> str:
        """The grammar that GrammarWriter.write() makes of these arguments as JSON, tried out. Raises SandboxError or
        SandboxBusy.
        """
        [text] = await self._ask(GRAMMAR + request)
        return text.decode()

    async def read_json(self, raw: bytes) -> list[bytes]:
        """A body, in pieces for join_pieces(). Raises SandboxError or SandboxBusy."""
        return await self._ask(READ + raw)

    async def warm_up(self) -> None:
        """Start the first process, so that no request waits for that. Raises ModelError: the template is invalid."""
        try:
            self._idle.append(await self._start())
        except SandboxError as error:
            raise ModelError(str(error)) from None

    async def close(self) -> None:
        """End the processes before this one ends."""
        for process in self._idle:
            process.kill()
            await process.wait()

    async def _ask(self, request: bytes) -> list[bytes]:
        try:
            await asyncio.wait_for(self._places.acquire(), PLACE_S)
        except TimeoutError:
            raise SandboxBusy from None
        task = asyncio.create_task(self._work(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Who leaves does not take the process along: it would answer the next one with this answer.
        return _checked(await asyncio.shield(task))

    async def _work(self, request: bytes) -> list[bytes]:
        try:
            while self._idle and self._idle[-1].returncode is not None:
                self._idle.pop()  # ended unasked: the machine was out of memory
            try:
                return await self._answer(self._idle.pop() if self._idle else await self._start(), request)
            except _LostError:  # whatever killed or froze it: another one gives the same answer
                return await self._answer(await self._start(), request)
        finally:
            self._places.release()

    async def _answer(self, process: Process, request: bytes) -> list[bytes]:
        answer = await self._exchange(process, request)
        self._idle.append(process)
        return answer

    async def _start(self) -> Process:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "deploy.ingress.sandbox_main",
            str(self._cpu_s),
            stdin=PIPE,
            stdout=PIPE,
            env=environment | {"PYTHONPATH": paths},
        )
        if self._set_up is not None:
            _checked(await self._exchange(process, self._set_up))
        return process

    async def _exchange(self, process: Process, request: bytes) -> list[bytes]:
        """The frames of an answer. Without one the process ends: SandboxError says why."""
        assert process.stdin
        assert process.stdout
        try:
            async with asyncio.timeout(ANSWER_S):
                process.stdin.write(len(request).to_bytes(4, "little") + request)
                await process.stdin.drain()
                return [await _frame(process.stdout) for _ in range(await _number(process.stdout))]
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            raise await self._end(process) from None

    async def _end(self, process: Process) -> SandboxError:
        """End a process that has not answered, unless it has ended already. Returns why."""
        try:
            code = await asyncio.wait_for(process.wait(), 1.0)
        except TimeoutError:
            process.kill()
            return _LostError(f"{self._what} has not ended within {ANSWER_S:g} s")
        if code == -signal.SIGPROF:
            return SandboxError(f"{self._what} takes more than {self._cpu_s:g} s of a processor")
        return _LostError(f"{self._what} has ended its process with code {code}")


def _checked(answer: list[bytes]) -> list[bytes]:
    error, *frames = answer
    if error:
        raise SandboxError(**json.loads(error))
    return frames


async def _number(stream: asyncio.StreamReader) -> int:
    return int.from_bytes(await stream.readexactly(4), "little")


async def _frame(stream: asyncio.StreamReader) -> bytes:
    return await stream.readexactly(await _number(stream))


async def sandboxed(work: Awaitable[T], param: str | None = None) -> T:
    """Raises APIError: 400 where the work is refused or takes too much, 429 where there is no place for it."""
    try:
        return await work
    except SandboxError as error:
        raise invalid_request(str(error), error.param or param, error.code or "invalid_value") from None
    except SandboxBusy:
        raise overloaded() from None
