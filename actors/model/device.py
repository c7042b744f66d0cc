"""Names of devices and types in messages, as torch knows them."""

import torch

from cluster.errors import ModelError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def torch_dtype(name: str) -> torch.dtype:
    return _DTYPES[name]


def torch_device(name: str) -> torch.device:
    """`auto` takes the GPU that Ray has assigned if torch can use it. Raises ModelError if cuda can't be had."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("device='cuda', but torch sees no GPU in this actor: install a CUDA build or set device=cpu")
    return torch.device(name)
