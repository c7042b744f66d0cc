"""What lies between the two products of an MLP, by its name in a model spec."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from cluster.models import spec

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[spec.Activation, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
