"""The tests of the native kernels once more, in a build that is too slow for use: with AddressSanitizer and
UndefinedBehaviorSanitizer, and with AVX512 and AMX emulated (emulated_intrinsics.h), so that every path runs.

The build is kept between runs, by what it was built of.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.kernels import native

KERNELS = native.LIBRARY.parent
SOURCES = sorted(KERNELS.glob("*.cpp"))
EMULATION = Path(__file__).with_name("emulated_intrinsics.h")
CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
EMULATED = ["-mavx2", "-mfma", "-include", str(EMULATION)]
BUILD = ["g++", "-O1", "-g1", "-std=c++20", "-shared", "-fPIC", "-pthread", *CHECKS, *EMULATED]
NAMES = (
    "test_native.py",
    "test_native_attention.py",
    "test_native_front_layer.py",
    "test_unix_lane.py",
    "test_express.py",
)
TESTS = [str(Path(__file__).with_name(name)) for name in NAMES]
RUN_TESTS = """
import sys, pathlib, pytest
from actors.kernels import native
native.LIBRARY = pathlib.Path(sys.argv[1])
raise SystemExit(pytest.main(sys.argv[2:]))
"""
# With one thread, all is configured by the one that asks.
COUNT_CONFIGURATIONS = """
import sys, pathlib, torch
from actors.kernels import native
native.LIBRARY = pathlib.Path(sys.argv[1])
torch.set_num_threads(1)
library, amx = native.loaded(), native.instruction_sets()["amx_bf16"]

def show(call):
    before = library.emulated_configurations()
    call()
    print(library.emulated_configurations() - before, library.emulated_tiles_in_use())

linear = native.NativeLinear(native.pack(torch.randn(160, 64).bfloat16()), 160, None, amx)
for num_tokens in (1, 20):
    show(lambda: linear(torch.randn(num_tokens, 64).bfloat16()))
for is_int8 in (False, True):
    gate_up, down = torch.randn(3, 320, 64).bfloat16(), torch.randn(3, 64, 160).bfloat16()
    experts = native.NativeExperts.of(gate_up, down, amx, is_int8)
    rows, gates = torch.tensor([[0, 1, 2]]), torch.ones(1, 3).bfloat16()
    show(lambda: experts.run(torch.randn(1, 64).bfloat16(), rows, gates))
"""


@pytest.fixture(scope="module")
def library(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = getattr(pytestconfig, "cache", None)  # as a plugin that can be left out
    return built((cache.mkdir if cache else tmp_path_factory.mktemp)("native-checked"))


def built(folder: Path) -> Path:
    """Built if it is not there. Two may build at once: each under a name of its own, until it is whole."""
    compiler = subprocess.run(["g++", "--version"], check=True, capture_output=True).stdout
    contents = [path.read_bytes() for path in (*SOURCES, *sorted(KERNELS.glob("*.h")), EMULATION)]
    parts = [compiler, repr(BUILD).encode(), *contents]
    name = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]
    library = folder / f"{name}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*BUILD, "-o", unfinished, *map(str, SOURCES)], check=True)
        unfinished.rename(library)
    return library


def run_python(script: str, library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Leaks are Python's and torch's; AddressSanitizer must be loaded before anything else."""
    preload = subprocess.run(["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True).stdout
    environment = {"LD_PRELOAD": preload.strip(), "ASAN_OPTIONS": "detect_leaks=0", "NATIVE_EXAMPLES": "8"}
    command = [sys.executable, "-c", script, str(library), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


needs_kernels = pytest.mark.skipif(
    not native.instruction_sets(), reason="no native kernels here: not built, or no AVX2"
)


@pytest.mark.needs("g++")
@needs_kernels
def test_every_instruction_set_stays_within_bounds(library: Path) -> None:
    # Of the lane, what is native; float32 differs in nothing that could be out of bounds. Deadlines are those of a
    # build that is fast: what takes seconds in this one counts as lost.
    slow = "not handed_over and not share_a_computation"
    # Where prompts are cut, as many places as there are kinds of edge.
    slow += " and not (wherever_it_is_cut and (63 or 64 or 129))"
    chosen = f"not forked and not (several_threads and not avx2) and not float32 and not python and {slow}"
    ran = run_python(RUN_TESTS, library, "-q", "-s", "-p", "no:cacheprovider", *TESTS, "-k", chosen)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "skipped" not in ran.stdout


@pytest.mark.needs("g++")
@needs_kernels
def test_tiles_are_configured_once_for_a_matrix_and_released_at_the_end(library: Path) -> None:
    """Not once for every 16 of its outputs. A call of experts has two shared-out stages, gate and up, then down."""
    ran = run_python(COUNT_CONFIGURATIONS, library)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines() == ["1 0", "1 0", "2 0", "2 0"]


@pytest.mark.needs("g++")
def test_a_build_is_kept_until_its_sources_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "one.cpp"
    source.write_text("int one() { return 1; }")
    monkeypatch.setitem(globals(), "SOURCES", [source])
    first = built(tmp_path)
    written = first.stat().st_mtime_ns
    assert built(tmp_path) == first
    assert first.stat().st_mtime_ns == written
    source.write_text("int one() { return 2; }")
    assert built(tmp_path) != first
    assert len(list(tmp_path.iterdir())) == 3, "nothing unfinished is left"
