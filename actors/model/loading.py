"""Loads a front's weights from a checkpoint: everything but the experts.

Shapes: V vocabulary, D hidden.
"""

from actors.model.front_half import FrontHalf, FrontWeights
from actors.model.front_layers import LayerWeights
from actors.model.layers import AnyLinear, Linear, in_place, packed
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

    return LayerWeights(
        attention_norm_D=weights.read(f"layers.{number}.attention_norm"),
        qkv=linear("q", "k", "v"),
        out=linear("o"),
        moe_norm_D=weights.read(f"layers.{number}.moe_norm"),
        router=in_place(Linear(weights.read(f"layers.{number}.router")), weights.compute),
    )
