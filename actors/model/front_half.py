"""The front's half of the model: embeddings, its half of each layer (front_layers.py), head. It holds no expert
weights and does not know where experts are: a Dispatcher does.

Shapes: T tokens of the step, R rows that need logits, D hidden, L layers, K top-k, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.compute import Compute
from actors.dispatch.dispatcher import Dispatcher
from actors.model.attention import AttentionPlan, plan_attention
from actors.model.batch import StepBatch
from actors.model.front_layers import LayerSteps, LayerWeights, NativeLayers, TorchLayers, native_layers
from actors.model.graphs import DecodeGraphs
from actors.model.layers import AnyLinear, rms_norm
from actors.model.paged_kv import PagedKV, routed_dtype
from actors.model.rope import Angles, rotaries
from actors.staging import Staging, staging_for
from cluster.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class FrontWeights:
    """`head` is the embedding itself when the model ties them."""

    embed_VD: Tensor
    layers: tuple[LayerWeights, ...]
    norm_D: Tensor
    head: AnyLinear


class FrontHalf:
    def __init__(
        self, spec: ModelSpec, compute: Compute, weights: FrontWeights, staging: Staging | None = None
    ) -> None:
        self.spec = spec
        self.compute = compute
        self.weights = weights
        self.staging = staging or staging_for(compute.device)
        self.rotaries = rotaries(spec, compute.device)
        self._native = native_layers(spec, weights.layers)
        self._place_of = spec.place_of
        # Only experts come between the halves of two layers: a dispatcher may go through several.
        self._is_plain = all(layer.mlp is None for layer in weights.layers)
        self.graphs: DecodeGraphs | None = None  # where decode steps are replayed

    @property
    def is_native(self) -> bool:
        """Whether one native call does the half of a layer."""
        return self._native is not None

    def forward(self, batch: StepBatch, kv: PagedKV, dispatcher: Dispatcher) -> tuple[Tensor, Tensor]:
        """Compute one step and write its keys, values and routing to the cache: in each layer
        attention -> route -> dispatch -> combine.

        Returns the final hidden states of `batch.rows_R` [R, D], for `logits`, and every token's experts [T, L, K], of
        the layers that have experts.
        """
        steps = self._steps(batch, kv)
        combined_TD: Tensor | None = None
        number = 0
        while number < steps.num_layers:
            if self._is_plain:
                combined_TD, number = dispatcher.go_through(steps, number, combined_TD)
            else:
                combined_TD, number = self._go_through(steps, number, combined_TD, dispatcher), number + 1
        ids_TLK = steps.all_chosen().to(routed_dtype(self.spec.num_experts))
        kv.write_routed(batch.slots_T, ids_TLK)
        assert combined_TD is not None, "a model has layers"
        rows_R = batch.rows_R
        x_RD = torch.add(steps.x_TD[rows_R], combined_TD[rows_R], alpha=self.spec.residual_multiplier)
        return rms_norm(x_RD, self.weights.norm_D, self.spec.norm_eps), ids_TLK

    def _go_through(self, steps: LayerSteps, number: int, combined_TD: Tensor | None, dispatcher: Dispatcher) -> Tensor:
        """A step's way through a layer of a model whose layers are not all alike: what experts and MLP combine to."""
        mlp = self.weights.layers[number].mlp
        h_TD, ids_TK, gates_TK = steps.attend_and_route(number, combined_TD)
        if ids_TK is None or gates_TK is None:
            assert mlp is not None, "a layer has experts or an MLP"
            return mlp(h_TD)
        place = self._place_of[number]
        if mlp is None:
            return dispatcher.exchange(place, h_TD, ids_TK, gates_TK)
        pending = dispatcher.dispatch(place, h_TD, ids_TK, gates_TK)
        shared_TD = mlp(h_TD)  # while the tokens are on their way
        return dispatcher.combine(pending) + shared_TD

    def _steps(self, batch: StepBatch, kv: PagedKV) -> LayerSteps:
        if self._native:
            return NativeLayers(self.spec, self._native, *self._embedded(batch), batch, kv)
        if self.graphs and batch.embeds is None and (replayed := self.graphs.steps(batch)):
            return replayed
        return self.torch_layers(batch, kv, plan_attention(batch, kv, self.compute, self.staging))

    def torch_layers(self, batch: StepBatch, kv: PagedKV, plan: AttentionPlan) -> TorchLayers:
        return TorchLayers(self.spec, self.weights.layers, *self._embedded(batch), batch, kv, plan)

    def _embedded(self, batch: StepBatch) -> tuple[Tensor, Angles]:
        """The residual stream before the first layer, and the angles of all positions."""
        x_TD = F.embedding(batch.token_ids_T, self.weights.embed_VD)
        if batch.embeds:
            x_TD[batch.embeds.rows_N] = batch.embeds.values_ND.to(x_TD.dtype)
        angles: Angles = {None: None}
        angles |= {base: r.angles(batch.positions_T, self.compute.dtype) for base, r in self.rotaries.items()}
        return x_TD * self.spec.embedding_multiplier, angles

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """float32 [R, V]."""
        return self.weights.head(hidden_RD).float() / self.spec.logits_divisor
