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

    slots_T, starts_S1, contexts_S: int64; blocks_SB: int32; cos_TC, sin_TC as Rotary.angles.
    """

    def __init__(
        self,
        slots_T: Tensor,
        starts_S1: Tensor,
        contexts_S: Tensor,
        blocks_SB: Tensor,
        angles: tuple[Tensor, Tensor],
        block_size: int,
    ) -> None:
        (S, B), (cos_TC, sin_TC) = blocks_SB.shape, angles
        tensors = {
            "slots": slots_T, "starts": starts_S1, "contexts": contexts_S, "blocks": blocks_SB,
            "cos": cos_TC, "sin": sin_TC,
        }  # fmt: skip
        self._tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        pointers = {name: tensor.data_ptr() for name, tensor in self._tensors.items()}
        self.fields = abi.Batch(T=len(slots_T), S=S, B=B, block_size=block_size, **pointers)


def attend(batch: NativeBatch, q_THC: Tensor, k_BPGC: Tensor, v_BPGC: Tensor, scale: float, isa: int) -> Tensor:
    """softmax(scale * q.k) v of each token over its sequence up to itself, [T, H, C]. q and the result are float32."""
    assert all(t.is_contiguous() for t in (k_BPGC, v_BPGC))
    assert q_THC.dtype == torch.float32
    q_THC, num_kv = q_THC.contiguous(), k_BPGC.shape[2]
    out_THC = torch.empty_like(q_THC)
    loaded().outcrop_attention(
        isa, torch.get_num_threads(), ctypes.byref(batch.fields), k_BPGC.data_ptr(), v_BPGC.data_ptr(), num_kv,
        q_THC.shape[2], q_THC.shape[1], scale, q_THC.data_ptr(), out_THC.data_ptr(),
    )  # fmt: skip
    return out_THC


@dataclass(frozen=True, slots=True)
class NativeFrontLayer:
    """`linears`: q, k and v stacked; o; router. `norms`: before attention, before the experts."""

    fields: abi.Layer
    linears: tuple[NativeLinear, NativeLinear, NativeLinear]
    norms: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls,
        linears: tuple[NativeLinear, NativeLinear, NativeLinear],
        norms: tuple[Tensor, Tensor],
        *,
        num_q: int,
        num_kv: int,
        head_dim: int,
        top_k: int,
        eps: float,
        residual: float,
        scale: float,
    ) -> "NativeFrontLayer":
        (qkv, out, router), (attention_norm, moe_norm) = linears, norms
        fields = abi.Layer(
            D=len(attention_norm), H=num_q, G=num_kv, C=head_dim, E=router.num_outputs, K=top_k,
            eps=eps, residual=residual, scale=scale,
            attention_norm=attention_norm.data_ptr(), moe_norm=moe_norm.data_ptr(),
            qkv=qkv.packed.data_ptr(), out=out.packed.data_ptr(), router=router.packed.data_ptr(),
            qkv_bias=None if qkv.bias_O is None else qkv.bias_O.data_ptr(),
            out_bias=None if out.bias_O is None else out.bias_O.data_ptr(),
        )  # fmt: skip
        return cls(fields, linears, norms)

    def run(
        self, batch: NativeBatch, k_BPGC: Tensor, v_BPGC: Tensor, x_TD: Tensor, combined_TD: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add to the residual stream x_TD, in place, what the experts of the layer before have combined to and this
        layer's attention; write keys and values to the cache. Returns (h_TD, ids_TK int64, gates_TK) for its experts.
        """
        assert all(t.is_contiguous() for t in (x_TD, k_BPGC, v_BPGC))
        combined_TD = None if combined_TD is None else combined_TD.contiguous()
        h_TD = torch.empty_like(x_TD)
        ids_TK = torch.empty(x_TD.shape[0], self.fields.K, dtype=torch.int64)
        gates_TK = x_TD.new_empty(ids_TK.shape)
        loaded().outcrop_front_layer(
            self.linears[0].isa, torch.get_num_threads(), ctypes.byref(self.fields), ctypes.byref(batch.fields),
            k_BPGC.data_ptr(), v_BPGC.data_ptr(), None if combined_TD is None else combined_TD.data_ptr(),
            x_TD.data_ptr(), h_TD.data_ptr(), ids_TK.data_ptr(), gates_TK.data_ptr(),
        )  # fmt: skip
        return h_TD, ids_TK, gates_TK
