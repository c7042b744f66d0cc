"""Builds the native kernels with the package, wheel or editable, where there is a compiler for C++20 (g++ or
clang++ from version 10 on) and an x86-64 CPU.

Without them the package is complete all the same: torch computes then. The library is compiled for any x86-64; what
needs more is chosen at run time.
"""

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
SHARED = ["-shared", "-fPIC", "-pthread", "-static-libstdc++", "-static-libgcc"]


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
        if platform.system() != "Linux" or platform.machine() != "x86_64" or compiler is None:
            self.app.display_warning("native kernels are left out: they need Linux on x86-64 and a C++ compiler")
            return
        kernels = Path(self.root, "actors", "kernels")
        library = kernels / "libkernels.so"
        command = [compiler, *FLAGS, *SHARED, "-o", str(library), *sorted(map(str, kernels.glob("*.cpp")))]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"native kernels are left out: {getattr(error, 'stderr', '') or error}")
            return
        build_data["artifacts"].append("actors/kernels/libkernels.so")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
