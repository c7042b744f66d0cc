"""What a checkpoint holds: every tensor that its model needs, found and checked, without reading one weight.

Knows the names under which GraniteMoe weights are published. Knows no torch: the CLI checks a checkpoint before it
starts anything.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ModelError
from cluster.models.granite_moe import GraniteMoeConfig
from cluster.models.tensor_files import Shape, TensorInfo, read_headers

SERVED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Our key -> the spellings in published checkpoints, the most common first. transformers 5 writes the older
# `input_linear` names unless asked for its own. Keys of a layer are prefixed with `layers.N.`, names with
# `model.layers.N.`.
MODEL_NAMES = {
    "embed": ("model.embed_tokens.weight",),
    "norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
}
LAYER_NAMES = {
    "attention_norm": ("input_layernorm.weight",),
    "q": ("self_attn.q_proj.weight",),
    "k": ("self_attn.k_proj.weight",),
    "v": ("self_attn.v_proj.weight",),
    "o": ("self_attn.o_proj.weight",),
    "q_bias": ("self_attn.q_proj.bias",),
    "k_bias": ("self_attn.k_proj.bias",),
    "v_bias": ("self_attn.v_proj.bias",),
    "o_bias": ("self_attn.o_proj.bias",),
    "moe_norm": ("post_attention_layernorm.weight",),
    "router": ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
    "gate_up": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    "down": ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
}
EXPERT_KEYS = ("gate_up", "down")


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checked checkpoint: every tensor the model needs, by our key (`embed`, `layers.3.router`, ...), and sizes in
    bytes as stored. `dtype` is the type of most of the bytes: float32, bfloat16 or float16."""

    tensors: dict[str, TensorInfo]
    dtype: str
    front_bytes: int
    expert_bytes: int
    bytes_per_expert: int

    @property
    def total_bytes(self) -> int:
        return self.front_bytes + self.expert_bytes


def layer_shapes(config: GraniteMoeConfig) -> dict[str, Shape]:
    """Shape of each tensor of a layer, by our key. Gate rows come before up rows in gate_up."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_heads, experts = config.num_key_value_heads * config.head_dim, config.num_local_experts
    shapes: dict[str, Shape] = {
        "attention_norm": (hidden,),
        "q": (heads, hidden),
        "k": (kv_heads, hidden),
        "v": (kv_heads, hidden),
        "o": (hidden, heads),
        "moe_norm": (hidden,),
        "router": (experts, hidden),
        "gate_up": (experts, 2 * config.intermediate_size, hidden),
        "down": (experts, hidden, config.intermediate_size),
    }
    if config.attention_bias:
        shapes |= {"q_bias": (heads,), "k_bias": (kv_heads,), "v_bias": (kv_heads,), "o_bias": (hidden,)}
    return shapes


def needed_tensors(config: GraniteMoeConfig) -> Iterator[tuple[str, tuple[str, ...], Shape]]:
    """(our key, spellings of its name, shape) of every tensor of the model. A tied head is the embedding."""
    table = (config.vocab_size, config.hidden_size)
    yield "embed", MODEL_NAMES["embed"], table
    yield "norm", MODEL_NAMES["norm"], (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "head", MODEL_NAMES["head"], table
    for layer in range(config.num_hidden_layers):
        for key, shape in layer_shapes(config).items():
            names = tuple(f"model.layers.{layer}.{name}" for name in LAYER_NAMES[key])
            yield f"layers.{layer}.{key}", names, shape


def check_checkpoint(model_dir: Path, config: GraniteMoeConfig) -> CheckpointInfo:
    """Find every tensor that the model needs and check its shape and type. Raises ModelError that names the tensor."""
    headers = read_headers(model_dir)
    tensors = {key: _find(headers, names, shape, model_dir) for key, names, shape in needed_tensors(config)}
    bytes_by_dtype: Counter[str] = Counter()
    for info in tensors.values():
        bytes_by_dtype[info.dtype] += info.num_bytes
    expert_bytes = sum(info.num_bytes for key, info in tensors.items() if key.endswith(EXPERT_KEYS))
    return CheckpointInfo(
        tensors=tensors,
        dtype=SERVED_DTYPES[bytes_by_dtype.most_common(1)[0][0]],
        front_bytes=bytes_by_dtype.total() - expert_bytes,
        expert_bytes=expert_bytes,
        bytes_per_expert=expert_bytes // (config.num_hidden_layers * config.num_local_experts),
    )


def _find(headers: dict[str, TensorInfo], names: tuple[str, ...], shape: Shape, model_dir: Path) -> TensorInfo:
    info = next((headers[name] for name in names if name in headers), None)
    if info is None:
        raise ModelError(f"{model_dir} lacks tensor {' (or '.join(names)}{')' * (len(names) - 1)} {list(shape)}")
    if info.shape != shape:
        raise ModelError(
            f"{info.file}: {info.name} has shape {list(info.shape)}, config.json asks for {list(shape)}: "
            "weights and config.json are of different models"
        )
    if info.dtype not in SERVED_DTYPES:
        raise ModelError(
            f"{info.file}: {info.name} is stored as {info.dtype}: only {', '.join(SERVED_DTYPES)} are served; "
            "use the checkpoint before quantisation"
        )
    return info
