"""CPU threads of an actor. Must be called before torch is imported: the OpenMP runtime reads these once."""

import os


def limit_threads(num_threads: int) -> None:
    """Use `num_threads` threads that sleep while they wait: fronts and replicas compute in turn on the same cores."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(num_threads)
    os.environ["OMP_WAIT_POLICY"] = "passive"
    import torch

    torch.set_num_threads(num_threads)
