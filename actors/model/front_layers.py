"""The front's half of each layer: residual stream, attention, router. One step's way through them, in torch or by the
native kernels.

Shapes: T tokens of the step, S sequences, D hidden, K top-k, H query heads, G key/value heads, C head dimension,
N heads of any kind.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.kernels.exchange import NativeSteps
from actors.kernels.front_layer import NativeFrontLayer
from actors.kernels.native import NativeLinear
from actors.model.attention import AttentionPlan, native_batch
from actors.model.batch import StepBatch
from actors.model.layers import AnyLinear, rms_norm
from actors.model.paged_kv import PagedKV
from actors.model.rope import apply_rotary
from actors.model.routing import route
from cluster.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """`qkv` is q, k and v stacked in this order: one matrix product instead of three."""

    attention_norm_D: Tensor
    qkv: AnyLinear
    out: AnyLinear
    moe_norm_D: Tensor
    router: AnyLinear


class LayerSteps(ABC):
    """One step in the front's half of all layers; `x_TD` is the residual stream."""

    x_TD: Tensor
    num_layers: int

    @abstractmethod
    def chosen(self, number: int) -> Tensor:
        """The experts that layer `number` has chosen, int64."""

    def all_chosen(self) -> Tensor:
        """The experts that all layers have chosen."""
        return torch.stack([self.chosen(number) for number in range(self.num_layers)], dim=1)

    def native_steps(self) -> NativeSteps | None:
        """The same for a native walk through the layers, or None where they are not native."""
        return None

    @abstractmethod
    def attend_and_route(self, number: int, combined_TD: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What layer `number` has for its experts: (h_TD, ids_TK int64, gates_TK).

        `combined_TD` is what the experts of the layer before have made of theirs. Keys and values go to the cache.
        """


class TorchLayers(LayerSteps):
    """Runs anywhere; the oracle of NativeLayers."""

    def __init__(
        self,
        spec: ModelSpec,
        layers: tuple[LayerWeights, ...],
        x_TD: Tensor,
        angles: tuple[Tensor, Tensor],
        batch: StepBatch,
        kv: PagedKV,
        plan: AttentionPlan,
    ) -> None:
        self.spec = spec
        self.layers = layers
        self.x_TD = x_TD
        self.angles = angles
        self.slots_T = batch.slots_T
        self.kv = kv
        self.plan = plan
        self.num_layers = len(layers)
        self._ids_TK: dict[int, Tensor] = {}

    def chosen(self, number: int) -> Tensor:
        return self._ids_TK[number]

    def attend_and_route(self, number: int, combined_TD: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        layer, spec = self.layers[number], self.spec
        if combined_TD is not None:
            self._add(combined_TD)
        self._add(self._attention(number, layer, rms_norm(self.x_TD, layer.attention_norm_D, spec.norm_eps)))
        h_TD = rms_norm(self.x_TD, layer.moe_norm_D, spec.norm_eps)
        self._ids_TK[number], gates_TK = route(h_TD, layer.router, spec.top_k)
        return h_TD, self._ids_TK[number], gates_TK

    def _add(self, y_TD: Tensor) -> None:
        self.x_TD = torch.add(self.x_TD, y_TD, alpha=self.spec.residual_multiplier)

    def _attention(self, number: int, layer: LayerWeights, h_TD: Tensor) -> Tensor:
        num_q, num_kv = self.spec.num_heads, self.spec.num_kv_heads
        qkv_TNC = layer.qkv(h_TD).view(h_TD.shape[0], -1, self.spec.head_dim)
        qk_TNC = apply_rotary(qkv_TNC[:, : num_q + num_kv], self.angles)
        q_THC, k_TGC = qk_TNC[:, :num_q], qk_TNC[:, num_q:]
        self.kv.write(number, self.slots_T, k_TGC, qkv_TNC[:, num_q + num_kv :])
        scale = self.spec.attention_scale
        out_THC = self.plan.attend(q_THC, self.kv.k_LBSGC[number], self.kv.v_LBSGC[number], scale)
        return layer.out(out_THC.flatten(1))


class NativeLayers(LayerSteps):
    """One native call per layer. Sums are float32 throughout; what the model stores is rounded as in TorchLayers."""

    def __init__(
        self,
        layers: tuple[NativeFrontLayer, ...],
        x_TD: Tensor,
        angles: tuple[Tensor, Tensor],
        batch: StepBatch,
        kv: PagedKV,
    ) -> None:
        self.layers = layers
        self.x_TD = x_TD
        self.kv = kv
        self.batch = native_batch(batch, kv.block_size, angles)
        self.num_layers = len(layers)
        self._ids_LTK = torch.empty(len(layers), len(x_TD), layers[0].fields.K, dtype=torch.int64)
        self._steps: NativeSteps | None = None

    def chosen(self, number: int) -> Tensor:
        return self._ids_LTK[number]

    def native_steps(self) -> NativeSteps | None:
        if self._steps is None:
            k_LX, v_LX = self.kv.k_LBSGC, self.kv.v_LBSGC
            self._steps = NativeSteps(self.layers, self.batch, k_LX, v_LX, self.x_TD, self._ids_LTK)
        return self._steps

    def attend_and_route(self, number: int, combined_TD: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        k_BSGC, v_BSGC = self.kv.k_LBSGC[number], self.kv.v_LBSGC[number]
        h_TD, ids_TK, gates_TK = self.layers[number].run(self.batch, k_BSGC, v_BSGC, self.x_TD, combined_TD)
        self._ids_LTK[number] = ids_TK
        return h_TD, ids_TK, gates_TK


def native_layers(spec: ModelSpec, layers: tuple[LayerWeights, ...]) -> tuple[NativeFrontLayer, ...] | None:
    """The same layers for NativeLayers, sharing their memory; None unless all are packed for the native kernels."""

    def native(layer: LayerWeights) -> NativeFrontLayer | None:
        qkv, out, router = layer.qkv, layer.out, layer.router
        if not (isinstance(qkv, NativeLinear) and isinstance(out, NativeLinear) and isinstance(router, NativeLinear)):
            return None
        return NativeFrontLayer.of(
            (qkv, out, router),
            (layer.attention_norm_D, layer.moe_norm_D),
            num_q=spec.num_heads,
            num_kv=spec.num_kv_heads,
            head_dim=spec.head_dim,
            top_k=spec.top_k,
            eps=spec.norm_eps,
            residual=spec.residual_multiplier,
            scale=spec.attention_scale,
        )

    found = tuple(each for each in map(native, layers) if each)
    return found if len(found) == len(layers) and spec.head_dim % 8 == 0 else None
