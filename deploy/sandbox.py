"""Processes beside this one, for work that can't be bounded in any other way: a checkpoint's chat template, which is a
program, and bodies so large that reading them would hold up everyone's streams. What takes too much time or memory
ends with its process, and only who asked for it waits for it.

They know no secret: they get few variables of our environment, and what they work on through a pipe.
"""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from typing import Any

from cluster.model_config import ModelError
from deploy.sandbox_main import CPU_S, READ, RENDER, SET_UP

MAX_PROCESSES = 4
# For a place among these processes, and for an answer: a process ends by itself long before, unless it is frozen.
PLACE_S = 10.0
ANSWER_S = 60.0
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "TZ")


class SandboxError(Exception):
    """What was asked for is refused, or takes too much. `param` and `code` as in APIError."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class SandboxBusy(Exception):  # noqa: N818 - an answer, not a failure
    """No place became free in time."""


class Sandbox:
    """Processes that are started when they are needed, and kept. They end with this one.

    `what` names the work in errors; `template` holds the arguments of ChatTemplate.
    """

    def __init__(self, what: str, template: dict[str, Any] | None = None) -> None:
        self._what = what
        self._set_up = None if template is None else SET_UP + _dump(template)
        self._places = asyncio.Semaphore(MAX_PROCESSES)
        self._idle: list[Process] = []

    async def render(self, **arguments: Any) -> str:
        """ChatTemplate.render(). Raises SandboxError or SandboxBusy."""
        [text] = await self._ask(RENDER + _dump(arguments))
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

    def close(self) -> None:
        while self._idle:
            self._idle.pop().kill()

    async def _ask(self, request: bytes) -> list[bytes]:
        try:
            await asyncio.wait_for(self._places.acquire(), PLACE_S)
        except TimeoutError:
            raise SandboxBusy from None
        try:
            process = self._idle.pop() if self._idle else await self._start()
            answer = await self._exchange(process, request)
            self._idle.append(process)
        finally:
            self._places.release()
        return _checked(answer)

    async def _start(self) -> Process:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "deploy.sandbox_main",
            stdin=PIPE,
            stdout=PIPE,
            env=environment | {"PYTHONPATH": paths},
        )
        if self._set_up is not None:
            _checked(await self._exchange(process, self._set_up))
        return process

    async def _exchange(self, process: Process, request: bytes) -> list[bytes]:
        """The frames of an answer. Whatever comes between ends the process: else the next would get this answer."""
        assert process.stdin
        assert process.stdout
        is_answered = False
        try:
            async with asyncio.timeout(ANSWER_S):
                process.stdin.write(len(request).to_bytes(4, "little") + request)
                await process.stdin.drain()
                frames = [await _frame(process.stdout) for _ in range(await _number(process.stdout))]
            is_answered = True
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            raise SandboxError(await self._end(process)) from None
        finally:
            if not is_answered:
                with suppress(ProcessLookupError):
                    process.kill()
        return frames

    async def _end(self, process: Process) -> str:
        """Why a process gave no answer."""
        with suppress(TimeoutError):
            if await asyncio.wait_for(process.wait(), 1.0) == -signal.SIGPROF:
                return f"{self._what} takes more than {CPU_S:g} s of processor time"
        return f"{self._what} was given up: its process ended, or did not answer within {ANSWER_S:g} s"


def join_pieces(pieces: list[bytes]) -> Any:
    """The JSON value that was read. For a thread: between pieces others get their turn."""
    whole, *rest = pieces
    content = json.loads(whole)
    for piece in rest:
        path, items = json.loads(piece)
        target = content
        for key in path:
            target = target[key]
        target += items
    return content


def _checked(answer: list[bytes]) -> list[bytes]:
    error, *frames = answer
    if error:
        raise SandboxError(**json.loads(error))
    return frames


async def _number(stream: asyncio.StreamReader) -> int:
    return int.from_bytes(await stream.readexactly(4), "little")


async def _frame(stream: asyncio.StreamReader) -> bytes:
    return await stream.readexactly(await _number(stream))


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
