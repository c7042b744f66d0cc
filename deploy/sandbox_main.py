"""What runs in a sandbox, see sandbox.py: one request after the other, until stdin ends.

A frame is 4 bytes of length and as many bytes. A request is one frame, its first byte says what to do. An answer is 4
bytes that count its frames, and the frames: the first holds the error as JSON, or nothing.
"""

import json
import resource
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from cluster.model_config import ModelError
from deploy.openai.chat_template import ChatTemplate, ChatTemplateError
from deploy.openai.errors import APIError, invalid_request
from deploy.openai.parsing import read_json

SET_UP, RENDER, READ = b"S", b"R", b"J"
MEMORY = 2**30
# Reading a piece of this size takes a few milliseconds.
PIECE_ITEMS, PIECE_CHARS = 4096, 100_000
MAX_CONTAINERS = 10_000


class Sandboxed:
    def __init__(self) -> None:
        self.template: ChatTemplate | None = None

    def answer(self, request: bytes) -> list[bytes]:
        kind, payload = request[:1], request[1:]
        try:
            if kind == READ:
                return [b"", *(piece.encode("utf-8", "surrogatepass") for piece in in_pieces(read_json(payload)))]
            given = json.loads(payload)
            if kind == SET_UP:
                self.template = ChatTemplate(**given)
                self.template.compile()
                return [b""]
            assert self.template is not None
            return [b"", self.template.render(**given).encode()]
        except APIError as error:
            return [json.dumps({"message": error.message, "param": error.param, "code": error.code}).encode()]
        except (ChatTemplateError, ModelError) as error:
            return [json.dumps({"message": str(error)}).encode()]
        except MemoryError:
            return [json.dumps({"message": f"it needs more than {MEMORY // 2**20} MiB of memory"}).encode()]


def in_pieces(content: Any) -> Iterator[str]:
    """A JSON value such that reading it needs no long calls: the whole without the items of long lists, then those,
    each piece with the path of its list; join_pieces() puts them together. Raises APIError (400).
    """
    taken: list[tuple[list[str | int], list[Any]]] = []
    todo: list[tuple[list[str | int], Any]] = [([], content)]
    num_containers = 0
    while todo:
        path, value = todo.pop()
        num_containers += 1 if isinstance(value, list) else 1 + len(value)
        items: Iterable[tuple[Any, Any]] = enumerate(value) if isinstance(value, list) else value.items()
        todo += [([*path, key], item) for key, item in items if isinstance(item, list | dict)]
        if num_containers + len(todo) > MAX_CONTAINERS:
            raise invalid_request(f"The body holds more than {MAX_CONTAINERS} lists, objects and fields")
        if isinstance(value, list) and len(value) > PIECE_ITEMS:
            taken.append((path, value.copy()))
            value.clear()
    yield json.dumps(content, ensure_ascii=False)
    for path, values in taken:
        for at in range(0, len(values), PIECE_ITEMS):
            yield from (f"[{json.dumps(path)},{piece}]" for piece in _dump(values[at : at + PIECE_ITEMS]))


def _dump(items: list[Any]) -> Iterator[str]:
    text = json.dumps(items, ensure_ascii=False)
    if len(text) <= PIECE_CHARS or len(items) == 1:
        yield text
        return
    yield from _dump(items[: len(items) // 2])
    yield from _dump(items[len(items) // 2 :])


def main(cpu_s: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends with whoever reads its answers
        signal.signal(number, signal.SIG_IGN)
    sandboxed, stdin, stdout = Sandboxed(), sys.stdin.buffer, sys.stdout.buffer
    while length := stdin.read(4):
        request = stdin.read(int.from_bytes(length, "little"))
        # When the time is up the signal ends this process, whatever it is doing, and whoever asked or not is there.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        frames = sandboxed.answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        stdout.write(len(frames).to_bytes(4, "little"))
        stdout.writelines(len(frame).to_bytes(4, "little") + frame for frame in frames)
        stdout.flush()


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main(float(sys.argv[1]))
