"""The paged KV cache: keys and values of every token, in blocks that any sequence may own.

Knows where bytes lie, not which sequence owns them (the engine's block allocator does). Slots that were never written
hold garbage, which may be NaN: readers must only touch slots of tokens that were written (see attention.py).

Shapes: L layers (of routed experts, those that have some), B blocks, S slots in a block, G key/value heads, C head
dimension, T tokens, K top-k.
"""

import torch
from torch import Tensor

from actors.compute import Compute
from cluster.models.sizes import kv_bytes_per_token
from cluster.models.spec import ModelSpec


def routed_dtype(num_experts: int) -> torch.dtype:
    """The smallest type that holds an expert's number; messages.RoutedExperts knows these two."""
    return torch.uint8 if num_experts <= 256 else torch.int16


class PagedKV:
    """k_LBSGC, v_LBSGC: rotated keys and values. routed_NLK: the experts that computed each cached token, kept
    because a prefix-cache hit skips the computation, but its routing may still be asked for."""

    def __init__(self, spec: ModelSpec, num_blocks: int, block_size: int, compute: Compute) -> None:
        shape = (spec.num_layers, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        routed_shape = (num_blocks * block_size, spec.num_expert_layers, spec.top_k)
        # empty: on CPU, pages get memory when they are first written, so an idle server stays small. On a GPU kernels
        # may read what they mask, and 0 * NaN is NaN.
        make = torch.empty if compute.device.type == "cpu" else torch.zeros
        self.k_LBSGC = make(shape, dtype=compute.dtype, device=compute.device)
        self.v_LBSGC = make(shape, dtype=compute.dtype, device=compute.device)
        self.routed_NLK = torch.empty(routed_shape, dtype=routed_dtype(spec.num_experts), device=compute.device)

    @property
    def num_blocks(self) -> int:
        return self.k_LBSGC.shape[1]

    @property
    def block_size(self) -> int:
        return self.k_LBSGC.shape[2]

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * sum(t[:, 0].nbytes for t in (self.k_LBSGC, self.v_LBSGC)) + self.routed_NLK.nbytes

    def write(self, layer: int, slots_T: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> None:
        self.k_LBSGC[layer].flatten(0, 1).index_copy_(0, slots_T, k_TGC)
        self.v_LBSGC[layer].flatten(0, 1).index_copy_(0, slots_T, v_TGC)

    def write_routed(self, slots_T: Tensor, ids_TLK: Tensor) -> None:
        self.routed_NLK.index_copy_(0, slots_T, ids_TLK)

    def read_routed(self, slots_T: Tensor) -> Tensor:
        """Experts of tokens that are in the cache, [T, L, K]."""
        return self.routed_NLK[slots_T]

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
        return block_size * kv_bytes_per_token(spec, dtype.itemsize)
