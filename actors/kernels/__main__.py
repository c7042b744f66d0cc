"""`python -m actors.kernels [auto|native|torch]` tells which kernels compute bfloat16 on this CPU, and why."""

import sys
from typing import cast

from actors.kernels.packed import Kernels, describe
from cluster.messages import KernelChoice

try:
    Kernels.choose(cast("KernelChoice", sys.argv[1] if len(sys.argv) > 1 else "auto"))
except RuntimeError as error:
    raise SystemExit(str(error)) from None
print(describe())
