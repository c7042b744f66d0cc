"""The C ABI as Python has it against what the library tells of itself."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.kernels import abi, native

Fields = list[tuple[str, Any]]
needs_library = pytest.mark.skipif(native.library() is None, reason=native.why_not_loaded())


@pytest.fixture
def reopened() -> Iterator[None]:
    """native.library() looks anew in the test, and after it."""
    native._open.cache_clear()
    yield
    native._open.cache_clear()


def without_blocks(fields: Fields) -> Fields:
    return [field for field in fields if field[0] != "blocks"]


def with_doubles(fields: Fields) -> Fields:
    return [(name, ctypes.c_double if kind is ctypes.c_float else kind) for name, kind in fields]


def with_norms_exchanged(fields: Fields) -> Fields:
    other = {"attention_norm": "moe_norm", "moe_norm": "attention_norm"}
    return [(other.get(name, name), kind) for name, kind in fields]


@needs_library
@pytest.mark.usefixtures("reopened")
@pytest.mark.parametrize(
    ("name", "change"), [("Batch", without_blocks), ("Layer", with_doubles), ("Layer", with_norms_exchanged)]
)
def test_a_library_with_other_structures_counts_as_not_loaded(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Fields], Fields]
) -> None:
    fields = change(list(getattr(abi, name)._fields_))
    monkeypatch.setattr(abi, name, type(name, (ctypes.Structure,), {"_fields_": fields}))
    assert native.library() is None
    assert (
        native.why_not_loaded() == f"the native kernels were built from other sources ({name}): install Outcrop again"
    )


@needs_library
@pytest.mark.usefixtures("reopened")
def test_so_does_one_whose_functions_take_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(abi.FUNCTIONS, "outcrop_read", (ctypes.c_uint64, (ctypes.c_long, ctypes.c_void_p)))
    monkeypatch.setitem(abi.FUNCTIONS, "outcrop_new", (None, ()))
    assert native.library() is None
    assert "(outcrop_new, outcrop_read)" in native.why_not_loaded()


@pytest.mark.usefixtures("reopened")
def test_what_is_missing_or_no_library_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "missing.so")
    assert native.library() is None
    assert "not been built" in native.why_not_loaded()
    native._open.cache_clear()
    (tmp_path / "missing.so").write_bytes(b"no library")
    assert native.library() is None
    assert "can't be loaded" in native.why_not_loaded()


@needs_library
def test_a_library_that_tells_nothing_of_itself_is_not_of_these_sources() -> None:
    assert abi.difference(ctypes.CDLL(None)) == "outcrop_abi"


@needs_library
def test_each_instruction_set_says_how_it_was_tested() -> None:
    assert native.why_not_loaded() == ""
    assert set(native.TESTED) == {native.loaded().outcrop_isa_name(number).decode() for number in range(3)}
    assert native.loaded().outcrop_isa_name(3) is None
