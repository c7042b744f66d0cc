"""What runs in a sandbox, see sandbox.py: one request after the other, until stdin ends.

A frame is 4 bytes of length and as many bytes. A request is one frame, its first byte says what to do. An answer is 4
bytes that count its frames, and the frames: the first holds the error as JSON, or nothing.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.errors import ModelError
from cluster.models.grammars import GrammarError, Grammars
from deploy.ingress.json_pieces import in_pieces
from deploy.ingress.openai.errors import APIError
from deploy.ingress.openai.parsing import read_json
from deploy.ingress.text.chat_template import ChatTemplate, ChatTemplateError
from deploy.ingress.text.grammar import GrammarWriter, Thought

SET_UP, RENDER, READ, TOKENIZER, GRAMMAR = b"S", b"R", b"J", b"T", b"G"
MEMORY = 2**30


class Sandboxed:
    def __init__(self) -> None:
        self.template: ChatTemplate | None = None
        self.grammars: Grammars | None = None

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
            if kind == TOKENIZER:
                self._read_tokenizer(**given)
                return [b""]
            if kind == GRAMMAR:
                return [b"", self._grammar(**given).encode()]
            assert self.template is not None
            return [b"", self.template.render(**given).encode()]
        except APIError as error:
            return [json.dumps({"message": error.message, "param": error.param, "code": error.code}).encode()]
        except (ChatTemplateError, GrammarError, ModelError) as error:
            return [json.dumps({"message": str(error)}).encode()]
        except MemoryError:
            return [json.dumps({"message": f"it needs more than {MEMORY // 2**20} MiB of memory"}).encode()]

    def _read_tokenizer(self, model_dir: str) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)  # it is the operator's, and may be large
        self.grammars = Grammars(Path(model_dir))

    def _grammar(self, kind: str, value: Any, thought: Thought) -> str:
        assert self.grammars is not None
        grammar = GrammarWriter(self.grammars.added).write(kind, value, thought)
        self.grammars.try_out(grammar)
        return grammar


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
