"""The heads of what travels over lanes, as tables: the Python of the lanes packs by them, and the native exchange has
the same as structures (wire.h), which abi.py compares with these. Little-endian, without gaps.
"""

import struct
from dataclasses import dataclass, field

# A field's code in struct, and what the C side calls its kind.
_KINDS = {"H": "i2", "I": "i4", "i": "i4", "Q": "i8"}


@dataclass(frozen=True, slots=True)
class Head:
    """`fields`: name and code of each, in their order."""

    name: str
    fields: tuple[tuple[str, str], ...]
    layout: struct.Struct = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", struct.Struct("<" + "".join(code for _, code in self.fields)))

    def line(self) -> str:
        """As outcrop_abi() tells of a structure."""
        parts, offset = [f"{self.name}:"], 0
        for name, code in self.fields:
            parts.append(f"{name} {_KINDS[code]} {offset}")
            offset += struct.calcsize("<" + code)
        return " ".join((*parts, str(offset)))


# Before each message on a stream: the number that the answer repeats, and the bytes of the message.
FRAME = Head("Frame", (("number", "Q"), ("length", "Q")))
DISPATCH = Head(
    "DispatchHead",
    (
        ("magic", "I"), ("dtype", "H"), ("front", "H"), ("step", "I"), ("layer", "H"), ("top_k", "H"),
        ("tokens", "I"), ("hidden", "I"),
    ),
)  # fmt: skip
# `expert` is the one that is not held; `nanoseconds` of computation.
PARTIAL = Head(
    "PartialHead",
    (
        ("magic", "I"), ("dtype", "H"), ("status", "H"), ("tokens", "I"), ("hidden", "I"), ("expert", "i"),
        ("nanoseconds", "Q"),
    ),
)  # fmt: skip

DISPATCH_MAGIC, PARTIAL_MAGIC = int.from_bytes(b"OCD2", "little"), int.from_bytes(b"OCP1", "little")
MAX_TOKENS, MAX_HIDDEN, MAX_TOP_K = 1 << 20, 1 << 16, 256
OK, NOT_HELD, FAILED = 0, 1, 2
# The place of a type's name is its code.
DTYPES = ("float32", "bfloat16", "float16")
# A dispatch of 16k tokens of hidden size 4096 in float32 is 256 MiB; nothing larger is a message of ours.
MAX_MESSAGE = 512 * 2**20


def numbers_line() -> str:
    """As outcrop_abi() tells of these numbers."""
    types = DTYPES.index("float32"), DTYPES.index("bfloat16")
    told = DISPATCH_MAGIC, PARTIAL_MAGIC, MAX_TOKENS, MAX_HIDDEN, MAX_TOP_K, OK, NOT_HELD, MAX_MESSAGE, *types
    return " ".join(("wire:", *map(str, told)))
