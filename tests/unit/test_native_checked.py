"""The tests of the native kernels once more, in a build that is too slow for use: with AddressSanitizer and
UndefinedBehaviorSanitizer, and with AVX512 and AMX emulated (emulated_intrinsics.h), so that every path runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.kernels import native

SOURCES = sorted(native.LIBRARY.parent.glob("*.cpp"))
CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
EMULATED = ["-mavx2", "-mfma", "-include", str(Path(__file__).with_name("emulated_intrinsics.h"))]
BUILD = ["g++", "-O1", "-g", "-std=c++17", "-shared", "-fPIC", "-pthread", *CHECKS, *EMULATED]
NAMES = ("test_native.py", "test_native_attention.py", "test_native_front_layer.py")
TESTS = [str(Path(__file__).with_name(name)) for name in NAMES]
RUN = """
import sys, pathlib, pytest
from actors.kernels import native
native.LIBRARY = pathlib.Path(sys.argv[1])
raise SystemExit(pytest.main(sys.argv[2:]))
"""


def run_tests(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Leaks are Python's and torch's; AddressSanitizer must be loaded before anything else."""
    preload = subprocess.run(["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True).stdout
    environment = {"LD_PRELOAD": preload.strip(), "ASAN_OPTIONS": "detect_leaks=0", "NATIVE_EXAMPLES": "8"}
    command = [sys.executable, "-c", RUN, str(library), "-q", "-s", "-p", "no:cacheprovider", *TESTS, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.needs("g++")
@pytest.mark.skipif(not native.instruction_sets(), reason="no native kernels here: not built, or no AVX2")
def test_every_instruction_set_stays_within_bounds(tmp_path: Path) -> None:
    library = tmp_path / "checked.so"
    subprocess.run([*BUILD, "-o", library, *map(str, SOURCES)], check=True)
    ran = run_tests(library, "-k", "not forked and not (several_threads and not avx2)")
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "skipped" not in ran.stdout
