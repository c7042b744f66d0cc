"""Loads a front's weights from a checkpoint: everything but the experts.

Shapes: V vocabulary, D hidden.
"""

from torch import Tensor

from actors.model.front_half import FrontHalf, FrontWeights
from actors.model.front_layers import LayerWeights
from actors.model.layers import AnyLinear, Linear, in_place, packed
from actors.model.mlp import load_mlp
from actors.staging import Staging
from actors.weights import Weights


def load_front(weights: Weights, staging: Staging | None = None) -> FrontHalf:
    compute = weights.compute
    embed_VD = weights.read("embed")
    # A tied head is packed only where nothing else is fast: it is in memory twice then.
    tied = weights.spec.tied_head
    head = in_place(Linear(embed_VD), compute) if tied else packed(Linear(weights.read("head")), compute)
    layers = tuple(_layer(weights, number) for number in range(weights.spec.num_layers))
    return FrontHalf(weights.spec, compute, FrontWeights(embed_VD, layers, weights.read("norm"), head), staging)


def _layer(weights: Weights, number: int) -> LayerWeights:
    def linear(*names: str) -> AnyLinear:
        keys = [f"layers.{number}.{name}" for name in names]
        has_bias = weights.spec.biases.issuperset(names)
        bias = weights.read_stacked(*(f"{key}_bias" for key in keys)) if has_bias else None
        return packed(Linear(weights.read_stacked(*keys), bias), weights.compute)

    def optional(name: str) -> Tensor | None:
        key = f"layers.{number}.{name}"
        return weights.read(key) if key in weights.checkpoint.tensors else None

    has_experts = weights.spec.layers[number].has_experts
    mlp = ("shared" if weights.spec.shared_size else "") if has_experts else "dense"
    return LayerWeights(
        attention_norm_D=weights.read(f"layers.{number}.attention_norm"),
        qkv=linear("q", "k", "v"),
        out=linear("o"),
        moe_norm_D=weights.read(f"layers.{number}.moe_norm"),
        router=in_place(Linear(weights.read(f"layers.{number}.router")), weights.compute) if has_experts else None,
        mlp=load_mlp(weights, f"layers.{number}.{mlp}_") if mlp else None,
        q_norm=optional("q_norm"),
        k_norm=optional("k_norm"),
        sinks_H=optional("sinks"),
    )
