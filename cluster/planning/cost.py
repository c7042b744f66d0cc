"""What a step of a model must read and multiply, from its spec alone. No times: those take a machine.

Bytes are of weights, keys and values; activations are small beside them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.models.spec import LayerSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Cost:
    num_bytes: float
    flops: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.num_bytes + other.num_bytes, self.flops + other.flops)

    def times(self, number: float) -> "Cost":
        return Cost(number * self.num_bytes, number * self.flops)


def expert_weights(spec: ModelSpec) -> int:
    """Numbers in one expert of one layer."""
    return 3 * spec.hidden_size * spec.expert_size


def layer_weights(spec: ModelSpec, layer: LayerSpec) -> int:
    """Numbers in a front's matrices of one layer: attention, router, and the MLP that is the front's own."""
    queries, keys = (n * spec.head_dim for n in (spec.num_heads, spec.num_kv_heads))
    router = spec.num_experts if layer.has_experts else 0
    mlp = 3 * (spec.shared_size if layer.has_experts else spec.dense_size)
    return spec.hidden_size * (2 * queries + 2 * keys + router + mlp)


def head_weights(spec: ModelSpec) -> int:
    return spec.vocab_size * spec.hidden_size


def kv_width(spec: ModelSpec) -> int:
    """Numbers that a token has in one layer's cache."""
    return 2 * spec.num_kv_heads * spec.head_dim


def num_touched(num_experts: int, top_k: int, num_tokens: float) -> float:
    """Experts of a layer that get a token, if each token chooses evenly."""
    missed: float = (1.0 - top_k / num_experts) ** num_tokens
    return num_experts * (1.0 - missed)


def experts_cost(spec: ModelSpec, num_tokens: float, touched: float, itemsize: int) -> Cost:
    """Experts of a layer, of which `touched` have tokens."""
    return Cost(touched * expert_weights(spec) * itemsize, 2 * num_tokens * spec.top_k * expert_weights(spec))


def attention_cost(spec: ModelSpec, layer: LayerSpec, new: float, context: float, itemsize: int) -> Cost:
    """Of a sequence with `new` tokens at the end of `context` ones, in one layer: keys and values read, and products.
    A window bounds what a token sees.
    """
    seen = min(context, layer.window + new - 1) if layer.window else context
    pairs = new * (context - (new - 1) / 2)
    if layer.window:
        pairs = min(pairs, new * layer.window)
    return Cost(seen * kv_width(spec) * itemsize, 4 * pairs * spec.num_heads * spec.head_dim)


def step_cost(
    spec: ModelSpec, lengths: Iterable[tuple[int, int]], itemsize: int, expert_itemsize: int | None = None
) -> Cost:
    """A step of sequences with (new tokens, context with them), one row of logits each; experts chosen evenly."""
    lengths = tuple(lengths)
    num_tokens = sum(new for new, _ in lengths)
    touched = num_touched(spec.num_experts, spec.top_k, num_tokens)
    experts = experts_cost(spec, num_tokens, touched, expert_itemsize or itemsize).times(spec.num_expert_layers)
    matrices = sum(layer_weights(spec, layer) for layer in spec.layers)
    front = Cost(matrices * itemsize, 2 * num_tokens * matrices)
    head = Cost(head_weights(spec) * itemsize, 2 * len(lengths) * head_weights(spec))
    attention = (attention_cost(spec, layer, *each, itemsize) for layer in spec.layers for each in lengths)
    return sum(attention, experts + front + head)
