"""Checkpoint: a model's directory, opened once. Its spec, and every tensor that the spec asks for, found and checked.

Not one weight is read. Knows no torch: the command line checks a checkpoint before it starts anything.
"""

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ModelError
from cluster.models.family import Family, Names, all_families, read_spec
from cluster.models.spec import ModelSpec
from cluster.models.tensor_files import Shape, TensorInfo, read_headers

SERVED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`tensors` are by our key (`embed`, `layers.3.router`, `layers.3.experts.gate_up` or, where each expert is stored
    by itself, `layers.3.experts.17.gate`). Layers are numbered as in the file. Sizes are in bytes as stored. `dtype` is
    the type of most of the bytes: float32, bfloat16 or float16.
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
        needed = needed_tensors(spec, headers)
        tensors = {key: _find(headers, names, shape, directory) for key, names, shape in needed}
        bytes_by_dtype: Counter[str] = Counter()
        for info in tensors.values():
            bytes_by_dtype[info.dtype] += info.num_bytes
        expert_bytes = sum(info.num_bytes for key, info in tensors.items() if ".experts." in key)
        dtype = SERVED_DTYPES[bytes_by_dtype.most_common(1)[0][0]]
        return cls(directory, spec, tensors, dtype, bytes_by_dtype.total() - expert_bytes, expert_bytes)

    @property
    def total_bytes(self) -> int:
        return self.front_bytes + self.expert_bytes

    @property
    def bytes_per_expert(self) -> int:
        return self.expert_bytes // (self.spec.num_expert_layers * self.spec.num_experts)

    @property
    def all_experts(self) -> tuple[tuple[int, ...], ...]:
        """Per layer that has experts, their ids."""
        return (tuple(range(self.spec.num_experts)),) * self.spec.num_expert_layers


def layer_shapes(spec: ModelSpec, number: int) -> dict[str, Shape]:
    """Shape of each tensor of a layer but those of its experts, by our key. Of an MLP, gate and up are stored as two
    tensors or as one, gate rows first: both are named here.
    """
    hidden, heads, kv_heads = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, Shape] = {
        "attention_norm": (hidden,),
        "q": (heads, hidden),
        "k": (kv_heads, hidden),
        "v": (kv_heads, hidden),
        "o": (hidden, heads),
        "moe_norm": (hidden,),
    }
    shapes |= {f"{key}_bias": shape[:1] for key, shape in shapes.items() if key in spec.biases}
    if spec.qk_norm != "none":
        is_of_head = spec.qk_norm == "head"
        shapes |= {"q_norm": (spec.head_dim if is_of_head else heads,)}
        shapes |= {"k_norm": (spec.head_dim if is_of_head else kv_heads,)}
    if spec.has_sinks:
        shapes["sinks"] = (spec.num_heads,)
    if not spec.layers[number].has_experts:
        return shapes | _mlp_shapes("dense_", spec.dense_size, hidden)
    shapes["router"] = (spec.num_experts, hidden)
    if spec.shared_size:
        shapes |= _mlp_shapes("shared_", spec.shared_size, hidden)
    return shapes | ({"shared_gating": (1, hidden)} if spec.shared_is_gated else {})


def _mlp_shapes(prefix: str, width: int, hidden: int) -> dict[str, Shape]:
    shapes = {"gate": (width, hidden), "up": (width, hidden), "gate_up": (2 * width, hidden), "down": (hidden, width)}
    return {prefix + key: shape for key, shape in shapes.items()}


def expert_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of each tensor of one expert, by our key."""
    return _mlp_shapes("", spec.expert_size, spec.hidden_size)


def needed_tensors(spec: ModelSpec, stored: Container[str] = ()) -> Iterator[tuple[str, tuple[str, ...], Shape]]:
    """(our key, spellings of its name, shape) of every tensor of the model. A tied head is the embedding.

    Experts are taken in the first of their family's forms of which the names that are `stored` have something.
    """
    family: Family = all_families()[spec.family]
    table = (spec.vocab_size, spec.hidden_size)
    yield "embed", family.model_tensors["embed"], table
    yield "norm", family.model_tensors["norm"], (spec.hidden_size,)
    if not spec.tied_head:
        yield "head", family.model_tensors["head"], table
    for number, layer in enumerate(spec.layers):
        prefix = family.layer_prefix.format(number)
        for key, shape in layer_shapes(spec, number).items():
            if key in family.layer_tensors or not key.startswith(("dense_", "shared_")):
                yield f"layers.{number}.{key}", tuple(prefix + name for name in family.layer_tensors[key]), shape
        if layer.has_experts:
            yield from _experts(spec, family, number, prefix, stored)


def _experts(
    spec: ModelSpec, family: Family, number: int, prefix: str, stored: Container[str]
) -> Iterator[tuple[str, tuple[str, ...], Shape]]:
    def is_stored(form: Names) -> bool:
        return any(prefix + name.format(0) in stored for names in form.values() for name in names)

    form = next(filter(is_stored, family.expert_forms), family.expert_forms[0])
    shapes = expert_shapes(spec)
    for key in form if "gate_up" in form else ():
        names = tuple(prefix + name for name in form[key])
        yield f"layers.{number}.experts.{key}", names, (spec.num_experts, *shapes[key])
    for expert in range(spec.num_experts) if "gate_up" not in form else ():
        for key in form:
            names = tuple(prefix + name.format(expert) for name in form[key])
            yield f"layers.{number}.experts.{expert}.{key}", names, shapes[key]


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
