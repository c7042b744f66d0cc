"""The front's half of each layer: residual stream, attention, router. One step's way through them, in torch or by the
native kernels.

Shapes: T tokens of the step, S sequences, D hidden, K top-k, H query heads, G key/value heads, C head dimension,
N heads of any kind.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.compute import why_not_native_attention
from actors.kernels.exchange import NativeSteps
from actors.kernels.front_layer import NativeFrontLayer
from actors.kernels.native import NativeLinear
from actors.model.attention import AttentionPlan, AttentionRule, native_batch
from actors.model.batch import StepBatch
from actors.model.layers import AnyLinear, rms_norm
from actors.model.mlp import Mlp
from actors.model.paged_kv import PagedKV
from actors.model.rope import Angles, apply_rotary
from actors.model.routing import route
from cluster.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """`qkv` is q, k and v stacked in this order: one matrix product instead of three. A layer without a router has no
    experts; `mlp` is its own, or the one beside its experts. Norms of q and k are [C], or [H C] and [G C].
    """

    attention_norm_D: Tensor
    qkv: AnyLinear
    out: AnyLinear
    moe_norm_D: Tensor
    router: AnyLinear | None
    mlp: Mlp | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    sinks_H: Tensor | None = None


# (h_TD, ids_TK int64, gates_TK); of a layer without experts, h_TD alone.
Routed = tuple[Tensor, Tensor | None, Tensor | None]


class LayerSteps(ABC):
    """One step in the front's half of all layers; `x_TD` is the residual stream."""

    x_TD: Tensor
    num_layers: int

    @abstractmethod
    def chosen(self, place: int) -> Tensor:
        """The experts that layer number `place` of those with experts has chosen, int64."""

    @abstractmethod
    def all_chosen(self) -> Tensor:
        """The experts that all layers with experts have chosen, [T, L, K]."""

    def native_steps(self) -> NativeSteps | None:
        """The same for a native walk through layers that all have experts, or None where they are not native."""
        return None

    @abstractmethod
    def attend_and_route(self, number: int, combined_TD: Tensor | None) -> Routed:
        """What layer `number` has for its experts and its MLP.

        `combined_TD` is what those of the layer before have made of theirs. Keys and values go to the cache.
        """


class TorchLayers(LayerSteps):
    """Runs anywhere; the oracle of NativeLayers."""

    def __init__(
        self,
        spec: ModelSpec,
        layers: tuple[LayerWeights, ...],
        x_TD: Tensor,
        angles: Angles,
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
        self._chosen: list[Tensor] = []  # [T, K] each

    def chosen(self, place: int) -> Tensor:
        return self._chosen[place]

    def all_chosen(self) -> Tensor:
        return torch.stack(self._chosen, dim=1)

    def attend_and_route(self, number: int, combined_TD: Tensor | None) -> Routed:
        layer, spec = self.layers[number], self.spec
        if combined_TD is not None:
            self._add(combined_TD)
        self._add(self._attention(number, layer, rms_norm(self.x_TD, layer.attention_norm_D, spec.norm_eps)))
        h_TD = rms_norm(self.x_TD, layer.moe_norm_D, spec.norm_eps)
        if layer.router is None:
            return h_TD, None, None
        ids_TK, gates_TK = route(h_TD, layer.router, spec.top_k, spec.router)
        self._chosen.append(ids_TK)
        return h_TD, ids_TK, gates_TK

    def _add(self, y_TD: Tensor) -> None:
        self.x_TD = torch.add(self.x_TD, y_TD, alpha=self.spec.residual_multiplier)

    def _attention(self, number: int, layer: LayerWeights, h_TD: Tensor) -> Tensor:
        spec, of_layer = self.spec, self.spec.layers[number]
        num_q, num_kv = spec.num_heads, spec.num_kv_heads
        qkv_TNC = self._qkv(layer, h_TD)
        qk_TNC, angles = qkv_TNC[:, : num_q + num_kv], self.angles[of_layer.rope_theta]
        if angles is not None:
            qk_TNC = apply_rotary(qk_TNC, angles)
        self.kv.write(number, self.slots_T, qk_TNC[:, num_q:], qkv_TNC[:, num_q + num_kv :])
        rule = AttentionRule(spec.attention_scale, of_layer.window, layer.sinks_H)
        out_THC = self.plan.attend(qk_TNC[:, :num_q], self.kv.k_LBSGC[number], self.kv.v_LBSGC[number], rule)
        return layer.out(out_THC.flatten(1))

    def _qkv(self, layer: LayerWeights, h_TD: Tensor) -> Tensor:
        """Queries, keys and values, before their positions are encoded: [T, H + 2 G, C]."""
        spec = self.spec
        qkv_TX = layer.qkv(h_TD)
        if layer.q_norm is not None and layer.k_norm is not None:
            widths = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
            q_TX, k_TX, v_TX = qkv_TX.split((*widths, widths[1]), dim=1)
            normed = (
                rms_norm(x_TX.reshape(-1, norm.numel()), norm, spec.norm_eps).view(x_TX.shape)
                for x_TX, norm in ((q_TX, layer.q_norm), (k_TX, layer.k_norm))
            )
            qkv_TX = torch.cat((*normed, v_TX), dim=1)
        if spec.clip_qkv is not None:
            qkv_TX = qkv_TX.clamp(-spec.clip_qkv, spec.clip_qkv)
        return qkv_TX.view(h_TD.shape[0], -1, spec.head_dim)


class NativeLayers(LayerSteps):
    """One native call per layer. Sums are float32 throughout; what the model stores is rounded as in TorchLayers."""

    def __init__(
        self,
        spec: ModelSpec,
        layers: tuple[NativeFrontLayer, ...],
        x_TD: Tensor,
        angles: Angles,
        batch: StepBatch,
        kv: PagedKV,
    ) -> None:
        self.layers = layers
        self.x_TD = x_TD
        self.kv = kv
        batches = {base: native_batch(batch, kv.block_size, of_base) for base, of_base in angles.items()}
        self.batches_L = [batches[layer.rope_theta] for layer in spec.layers]
        self.num_layers = len(layers)
        self._place_of = spec.place_of
        self._ids_LTK = torch.empty(spec.num_expert_layers, len(x_TD), spec.top_k, dtype=torch.int64)
        self._steps: NativeSteps | None = None

    def chosen(self, place: int) -> Tensor:
        return self._ids_LTK[place]

    def all_chosen(self) -> Tensor:
        return self._ids_LTK.transpose(0, 1)

    def native_steps(self) -> NativeSteps | None:
        if self._steps is None:
            k_LX, v_LX = self.kv.k_LBSGC, self.kv.v_LBSGC
            self._steps = NativeSteps(self.layers, self.batches_L, k_LX, v_LX, self.x_TD, self._ids_LTK)
        return self._steps

    def attend_and_route(self, number: int, combined_TD: Tensor | None) -> Routed:
        k_BSGC, v_BSGC = self.kv.k_LBSGC[number], self.kv.v_LBSGC[number]
        h_TD, ids_TK, gates_TK = self.layers[number].run(self.batches_L[number], k_BSGC, v_BSGC, self.x_TD, combined_TD)
        if ids_TK is not None:
            self._ids_LTK[self._place_of[number]] = ids_TK
        return h_TD, ids_TK, gates_TK


def native_layers(spec: ModelSpec, layers: tuple[LayerWeights, ...]) -> tuple[NativeFrontLayer, ...] | None:
    """The same layers for NativeLayers, sharing their memory; None unless all are packed for the native kernels."""
    if why_not_native_attention(spec):
        return None
    found = tuple(each for number in range(len(layers)) if (each := _native_layer(spec, layers[number], number)))
    return found if len(found) == len(layers) else None


def _native_layer(spec: ModelSpec, layer: LayerWeights, number: int) -> NativeFrontLayer | None:
    qkv, out, router = layer.qkv, layer.out, layer.router
    if not (isinstance(qkv, NativeLinear) and isinstance(out, NativeLinear)):
        return None
    if not (router is None or isinstance(router, NativeLinear)):
        return None
    vectors = {
        "attention_norm": layer.attention_norm_D, "moe_norm": layer.moe_norm_D,
        "q_norm": layer.q_norm, "k_norm": layer.k_norm, "sinks": layer.sinks_H,
    }  # fmt: skip
    return NativeFrontLayer.of(
        (qkv, out, router),
        vectors,
        D=spec.hidden_size,
        H=spec.num_heads,
        G=spec.num_kv_heads,
        C=spec.head_dim,
        K=spec.top_k,
        window=spec.layers[number].window or 0,
        gates_over_all=spec.router.softmax_over == "all",
        is_normalised=spec.router.is_normalised,
        eps=spec.norm_eps,
        residual=spec.residual_multiplier,
        scale=spec.attention_scale,
        clip=spec.clip_qkv or 0.0,
    )
