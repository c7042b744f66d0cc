"""ModelSpec: a decoder with experts, described without naming its family. All that the runtime knows of a model.

A family's module (families/) parses its config.json into one. Knows no torch: every process may read it.
"""

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
    may be normalised to a sum of 1; of the chosen they are.
    """

    softmax_over: Literal["chosen", "all"] = "chosen"
    is_normalised: bool = True


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes are widths of vectors. `biases` names the linear layers that have one, by our keys (q, k, v, o, ...).

    `qk_norm` is an RMSNorm of queries and keys, of each head or over all heads together; `clip_qkv` bounds what comes
    out of it, and values. With sinks, a head's attention is multiplied by sigmoid(logsumexp(scores) - sink). Layers
    without experts have an MLP of `dense_size`. Beside the experts of a layer there may be a shared MLP of
    `shared_size` that every token goes through, times the sigmoid of a product of its own if it is gated.

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
    clip_qkv: float | None = None
    has_sinks: bool = False
    dense_size: int = 0
    shared_size: int = 0
    shared_is_gated: bool = False
    tied_head: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: StoredDtype | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have experts. Whoever is told of experts counts these layers alone: layer 0 of an
        expert map, of a dispatch or of routed experts is the first of them.
        """
        return tuple(number for number, layer in enumerate(self.layers) if layer.has_experts)

    @property
    def place_of(self) -> dict[int, int]:
        """Of each layer that has experts, its number among those."""
        return {number: place for place, number in enumerate(self.expert_layers)}

    @property
    def num_expert_layers(self) -> int:
        return len(self.expert_layers)

    @property
    def rope_original_context(self) -> int:
        """Context length before rope scaling."""
        return self.rope.original_max_position_embeddings or self.max_positions
