"""`python -m actors.kernels [auto|native|torch [auto|int8]]` tells what computes on this CPU, and why."""

import sys
from typing import cast

from actors.kernels.packed import Kernels, are_experts_int8, describe, describe_int8
from cluster.messages.actors import ExpertDtype, KernelChoice

choice, experts = [*sys.argv[1:], "auto", "auto"][:2]
try:
    Kernels.choose(cast("KernelChoice", choice), cast("ExpertDtype", experts))
except RuntimeError as error:
    raise SystemExit(str(error)) from None
print(f"bfloat16 on this CPU: {describe()}")
if are_experts_int8():
    print(f"int8 experts: {describe_int8()}")
