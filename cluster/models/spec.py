"""ModelSpec: a decoder with experts, described without naming its family. All that the runtime knows of a model.

A family's module (families/) parses its config.json into one. Knows no torch: every process may read it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cluster.models.rope import Rope

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
StoredDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer. `window` counts the tokens that a query sees, itself included; None is all
    of them. Without a `rope_theta` the layer encodes no positions.
    """

    has_experts: bool = True
    window: int | None = None
    rope_theta: float | None = 10_000.0


@dataclass(frozen=True, slots=True)
class RouterRule:
    """Gates are a softmax over the `chosen` logits, or over `all` of them before the top k are chosen. Those of `all`
    may be `normalised` to a sum of 1. `scale` multiplies them in the end.
    """

    softmax_over: Literal["chosen", "all"] = "chosen"
    normalised: bool = True
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes are widths of vectors. `biases` names the linear layers that have one, by our keys (q, k, v, o, ...).

    `max_positions` is what the position encoding was made for; `max_context` is the longest sequence, prompt and
    output, that is computed as the reference model computes it. `dtype` is what config.json says, if anything.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_size: int
    layers: tuple[LayerSpec, ...]
    rope: Rope
    max_positions: int
    max_context: int
    activation: Activation = "silu"
    router: RouterRule = RouterRule()
    norm_eps: float = 1e-6
    attention_scale: float = 1.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    biases: frozenset[str] = frozenset()
    qk_norm: Literal["none", "head", "projection"] = "none"
    has_sinks: bool = False
    dense_size: int = 0
    shared_size: int = 0
    tied_head: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: StoredDtype | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def rope_original_context(self) -> int:
        """Context length before rope scaling."""
        return self.rope.original_max_position_embeddings or self.max_positions


def not_computed(spec: ModelSpec) -> Iterator[str]:
    """What the spec asks for and the front half does not compute yet: a model must not be served without it."""
    if not all(layer.has_experts for layer in spec.layers):
        yield "layers without experts"
    if any(layer.window is not None for layer in spec.layers):
        yield "attention windows"
    if {layer.rope_theta for layer in spec.layers} != {spec.rope.rope_theta}:
        yield "another position encoding in some layers"
    if spec.router != RouterRule():
        yield f"the router rule {spec.router}"
    if spec.qk_norm != "none":
        yield f"qk_norm={spec.qk_norm!r}"
    if spec.has_sinks:
        yield "attention sinks"
    if spec.shared_size:
        yield "shared experts"
    if spec.biases not in (frozenset(), frozenset("qkvo")):
        yield f"biases of {', '.join(sorted(spec.biases))} alone"
