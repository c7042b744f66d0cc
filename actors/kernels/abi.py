"""The kernels' C ABI (abi.h) as Python calls it. A library that was built from other sources is not used: what it tells
of itself (abi.cpp) differs from this.
"""

import ctypes
from typing import Any

from actors.kernels import heads

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("T", "S", "B", "block_size")),
        *((name, _POINTER) for name in ("slots", "starts", "contexts", "blocks", "cos", "sin")),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("D", "H", "G", "C", "E", "K", "window", "q_norm_width", "k_norm_width")),
        *((name, ctypes.c_int64) for name in ("gates_over_all", "is_normalised")),
        *((name, _FLOAT) for name in ("eps", "residual", "scale", "clip")),
        *((name, _POINTER) for name in ("attention_norm", "moe_norm", "q_norm", "k_norm", "sinks")),
        *((name, _POINTER) for name in ("qkv", "out", "router", "qkv_bias", "out_bias")),
    )


def _structure(name: str, numbers: str, pointers: str = "", more: str = "") -> type[ctypes.Structure]:
    """Of int64 numbers, then pointers, then more numbers."""
    kinds = ((numbers, ctypes.c_int64), (pointers, _POINTER), (more, ctypes.c_int64))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# See exchange.h.
Homes = _structure("Homes", "E most", "home numbers")
Replica = _structure("Replica", "fd num_sent")
Part = _structure("Part", "state replica tokens number sent_at answered_at compute_ns sent length received", "answer")
Exchange = _structure("Exchange", "G dtype front step", "first replicas patience", "next_number")
Arrival = _structure("Arrival", "peer number length", "message")
NO_TOKENS, ANSWERED, WAITING, ODD, LOST = range(5)  # PartState
NOTHING, KNOCKED, CAME = range(3)  # ServingEvent
PATIENCE = 21
MAX_BOUNDS = 24


class Steps(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("isa", "threads", "L")),
        *((name, _POINTER) for name in ("layers", "batches", "k", "v")),
        ("cache", ctypes.c_int64),
        *((name, _POINTER) for name in ("x", "h", "combined", "ids", "gates", "exchange", "homes", "parts", "seconds")),
    )


class ServingCounts(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("began_at", "tokens", "messages", "dropped", "nanoseconds")),
        ("at_most", ctypes.c_int64 * MAX_BOUNDS),
    )


STRUCTURES = ("Batch", "Layer", "Homes", "Replica", "Part", "Exchange", "Steps", "ServingCounts", "Arrival")

# Result and arguments.
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "outcrop_isa_name": (ctypes.c_char_p, (_INT,)),
    "outcrop_isa_works": (_INT, (_INT,)),
    "outcrop_packed_bytes": (_LONG, (_INT, _LONG, _LONG)),
    "outcrop_pack": (None, (_INT, _POINTER, _LONG, _LONG, _POINTER)),
    "outcrop_linear": (None, (_INT, _LONG, _POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _POINTER)),
    "outcrop_experts": (
        None,
        (_INT, _INT, _LONG, _POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER),
    ),
    "outcrop_attention": (
        None,
        (_INT, _LONG, *[_POINTER] * 3, *[_LONG] * 3, _FLOAT, _LONG, *[_POINTER] * 3),
    ),
    "outcrop_front_layer": (None, (_INT, _LONG, *[_POINTER] * 9)),
    "outcrop_use_huge_pages": (None, (_POINTER, _LONG)),
    "outcrop_read": (ctypes.c_uint64, (_LONG, _POINTER, _LONG)),
    "outcrop_exchange": (_INT, (_POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, *[_POINTER] * 5)),
    "outcrop_steps": (_LONG, (_POINTER, _LONG, _POINTER)),
    "outcrop_serving_new": (_POINTER, (_INT, _INT, *[_LONG] * 5, _POINTER, _LONG)),
    "outcrop_serving_listen": (None, (_POINTER, _INT)),
    "outcrop_serving_close": (None, (_POINTER,)),
    "outcrop_serving_counts": (_POINTER, (_POINTER,)),
    "outcrop_serving_set_layer": (None, (_POINTER, _LONG, _POINTER, _LONG, _POINTER)),
    "outcrop_serving_add": (None, (_POINTER, _INT)),
    "outcrop_serving_run": (_INT, (_POINTER, _LONG, _LONG, _POINTER)),
    "outcrop_serving_answer": (None, (_POINTER, _LONG, _LONG, _POINTER, _LONG)),
    "outcrop_serving_stop": (None, (_POINTER,)),
    "outcrop_serving_num_peers": (_LONG, (_POINTER,)),
}


def difference(library: ctypes.CDLL) -> str:
    """Which structures and functions the library has otherwise than this file; empty where it has none."""
    try:
        tell = library.outcrop_abi
    except AttributeError:
        return "outcrop_abi"
    tell.restype = ctypes.c_char_p
    differing = set(tell().decode().splitlines()) ^ set(_lines())
    return ", ".join(sorted({line.split(":")[0] for line in differing}))


def declare(library: ctypes.CDLL) -> None:
    """Have ctypes convert arguments and results."""
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def _lines() -> list[str]:
    """As outcrop_abi() has them."""
    functions = [f"{name}: {' '.join(map(_kind, (result, *args)))}" for name, (result, args) in FUNCTIONS.items()]
    tables = (heads.FRAME, heads.DISPATCH, heads.PARTIAL)
    return [
        *(_line_of(globals()[name]) for name in STRUCTURES),
        *(head.line() for head in tables),
        heads.numbers_line(),
        *functions,
    ]


def _line_of(structure: type[ctypes.Structure]) -> str:
    fields = (f"{name} {_kind(kind)} {getattr(structure, name).offset}" for name, kind, *_ in structure._fields_)
    return " ".join((f"{structure.__name__}:", *fields, str(ctypes.sizeof(structure))))


def _kind(kind: Any) -> str:
    if kind is None:
        return "void"
    if kind in (_POINTER, ctypes.c_char_p):
        return "p"
    return f"{'f' if kind is _FLOAT else 'i'}{ctypes.sizeof(kind)}"
