"""Checkpoint: a model's directory, opened once. Its spec, and every tensor that the spec asks for, found and checked.

Not one weight is read. Knows no torch: the command line checks a checkpoint before it starts anything.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ModelError
from cluster.models.family import Family, all_families, read_spec
from cluster.models.spec import ModelSpec
from cluster.models.tensor_files import Shape, TensorInfo, read_headers

SERVED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
EXPERT_KEYS = ("gate_up", "down")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`tensors` are by our key (`embed`, `layers.3.router`, ...). Sizes are in bytes as stored. `dtype` is the type of
    most of the bytes: float32, bfloat16 or float16.
    """

    directory: Path
    spec: ModelSpec
    tensors: Mapping[str, TensorInfo]
    dtype: str
    front_bytes: int
    expert_bytes: int

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Read config.json, find every tensor that the model needs, and check its shape and type.

        Raises ModelError that names the file, the field or the tensor.
        """
        spec = read_spec(directory)
        headers = read_headers(directory)
        tensors = {key: _find(headers, names, shape, directory) for key, names, shape in needed_tensors(spec)}
        bytes_by_dtype: Counter[str] = Counter()
        for info in tensors.values():
            bytes_by_dtype[info.dtype] += info.num_bytes
        expert_bytes = sum(info.num_bytes for key, info in tensors.items() if key.endswith(EXPERT_KEYS))
        dtype = SERVED_DTYPES[bytes_by_dtype.most_common(1)[0][0]]
        return cls(directory, spec, tensors, dtype, bytes_by_dtype.total() - expert_bytes, expert_bytes)

    @property
    def total_bytes(self) -> int:
        return self.front_bytes + self.expert_bytes

    @property
    def bytes_per_expert(self) -> int:
        return self.expert_bytes // (self.spec.num_layers * self.spec.num_experts)

    @property
    def all_experts(self) -> tuple[tuple[int, ...], ...]:
        """Per layer, the ids of its experts."""
        return (tuple(range(self.spec.num_experts)),) * self.spec.num_layers


def layer_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of each tensor of a layer, by our key. Gate rows come before up rows in gate_up."""
    hidden, heads, kv_heads = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, Shape] = {
        "attention_norm": (hidden,),
        "q": (heads, hidden),
        "k": (kv_heads, hidden),
        "v": (kv_heads, hidden),
        "o": (hidden, heads),
        "moe_norm": (hidden,),
        "router": (spec.num_experts, hidden),
        "gate_up": (spec.num_experts, 2 * spec.expert_size, hidden),
        "down": (spec.num_experts, hidden, spec.expert_size),
    }
    return shapes | {f"{key}_bias": shape[:1] for key, shape in shapes.items() if key in spec.biases}


def needed_tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[str, ...], Shape]]:
    """(our key, spellings of its name, shape) of every tensor of the model. A tied head is the embedding."""
    family: Family = all_families()[spec.family]
    table = (spec.vocab_size, spec.hidden_size)
    yield "embed", family.model_tensors["embed"], table
    yield "norm", family.model_tensors["norm"], (spec.hidden_size,)
    if not spec.tied_head:
        yield "head", family.model_tensors["head"], table
    for layer in range(spec.num_layers):
        prefix = family.layer_prefix.format(layer)
        for key, shape in layer_shapes(spec).items():
            yield f"layers.{layer}.{key}", tuple(prefix + name for name in family.layer_tensors[key]), shape


def _find(headers: dict[str, TensorInfo], names: tuple[str, ...], shape: Shape, directory: Path) -> TensorInfo:
    info = next((headers[name] for name in names if name in headers), None)
    if info is None:
        raise ModelError(f"{directory} lacks tensor {' (or '.join(names)}{')' * (len(names) - 1)} {list(shape)}")
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
