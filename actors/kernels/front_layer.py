"""The native front half of a layer (front_layer.cpp, attention.cpp): attention and router in one call.

Shapes: T tokens, S sequences, D hidden, E experts, K top-k, H query heads, G key/value heads, C head dimension, B
blocks, P slots of a block. bfloat16 on the CPU; C is a multiple of 8.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.kernels import abi
from actors.kernels.native import NativeLinear, loaded


class NativeBatch:
    """A step's new tokens, sequence by sequence: sequence s has rows starts_S1[s] to starts_S1[s + 1], and
    contexts_S[s] tokens in the cache once its new ones are written.

    slots_T, starts_S1, contexts_S: int64; blocks_SB: int32; cos_TC, sin_TC as Rotary.angles, or None where positions
    are not encoded.
    """

    def __init__(
        self,
        slots_T: Tensor,
        starts_S1: Tensor,
        contexts_S: Tensor,
        blocks_SB: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        block_size: int,
    ) -> None:
        S, B = blocks_SB.shape
        tensors = {"slots": slots_T, "starts": starts_S1, "contexts": contexts_S, "blocks": blocks_SB}
        tensors |= {} if angles is None else dict(zip(("cos", "sin"), angles, strict=True))
        self._tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        pointers = {name: tensor.data_ptr() for name, tensor in self._tensors.items()}
        self.fields = abi.Batch(T=len(slots_T), S=S, B=B, block_size=block_size, **pointers)


def attend(
    batch: NativeBatch,
    q_THC: Tensor,
    k_BPGC: Tensor,
    v_BPGC: Tensor,
    scale: float,
    isa: int,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q.k) v of each token over its sequence up to itself, [T, H, C]. q and the result are float32;
    window and sinks (bfloat16) as in AttentionRule.
    """
    assert all(t.is_contiguous() for t in (k_BPGC, v_BPGC))
    assert q_THC.dtype == torch.float32
    q_THC, num_kv = q_THC.contiguous(), k_BPGC.shape[2]
    out_THC = torch.empty_like(q_THC)
    loaded().outcrop_attention(
        isa, torch.get_num_threads(), ctypes.byref(batch.fields), k_BPGC.data_ptr(), v_BPGC.data_ptr(), num_kv,
        q_THC.shape[2], q_THC.shape[1], scale, window or 0, pointer(sinks_H), q_THC.data_ptr(), out_THC.data_ptr(),
    )  # fmt: skip
    return out_THC


def pointer(tensor: Tensor | None) -> int | None:
    """Where its numbers are; null for none."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


@dataclass(frozen=True, slots=True)
class NativeFrontLayer:
    """`linears`: q, k and v stacked; o; router, unless the layer has no experts. `fields` point at them and at all that
    `kept` keeps in memory.
    """

    fields: abi.Layer
    linears: tuple[NativeLinear, NativeLinear, NativeLinear | None]
    kept: tuple[Tensor | None, ...]

    @classmethod
    def of(
        cls,
        linears: tuple[NativeLinear, NativeLinear, NativeLinear | None],
        vectors: dict[str, Tensor | None],
        **numbers: float,
    ) -> "NativeFrontLayer":
        """`vectors` and `numbers` are fields of abi.Layer: norms and sinks, sizes and factors."""
        qkv, out, router = linears
        packed = {"qkv": qkv.packed, "out": out.packed, "router": router.packed if router else None}
        tensors = vectors | packed | {"qkv_bias": qkv.bias_O, "out_bias": out.bias_O}
        widths = {f"{name}_width": len(norm) for name in ("q_norm", "k_norm") if (norm := vectors[name]) is not None}
        pointers = {name: pointer(tensor) for name, tensor in tensors.items()}
        fields = abi.Layer(E=router.num_outputs if router else 0, **widths, **numbers, **pointers)
        return cls(fields, linears, tuple(tensors.values()))

    def run(
        self, batch: NativeBatch, k_BPGC: Tensor, v_BPGC: Tensor, x_TD: Tensor, combined_TD: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Add to the residual stream x_TD, in place, what the experts of the layer before have combined to and this
        layer's attention; write keys and values to the cache. Returns (h_TD, ids_TK int64, gates_TK) for its experts;
        of a layer without experts, h_TD alone.
        """
        assert all(t.is_contiguous() for t in (x_TD, k_BPGC, v_BPGC))
        combined_TD = None if combined_TD is None else combined_TD.contiguous()
        h_TD = torch.empty_like(x_TD)
        ids_TK = gates_TK = None
        if self.fields.E:
            ids_TK = torch.empty(x_TD.shape[0], self.fields.K, dtype=torch.int64)
            gates_TK = x_TD.new_empty(ids_TK.shape)
        loaded().outcrop_front_layer(
            self.linears[0].isa, torch.get_num_threads(), ctypes.byref(self.fields), ctypes.byref(batch.fields),
            k_BPGC.data_ptr(), v_BPGC.data_ptr(), pointer(combined_TD),
            x_TD.data_ptr(), h_TD.data_ptr(), pointer(ids_TK), pointer(gates_TK),
        )  # fmt: skip
        return h_TD, ids_TK, gates_TK
