"""Where a checkpoint is and what it holds: names, shapes and types of its tensors, without reading one weight.

Knows the safetensors header format (https://github.com/huggingface/safetensors#format) and the names under which
GraniteMoe weights are published. Knows no torch: the CLI checks a checkpoint before it starts anything.
"""

import json
import math
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.model_config import MALFORMED, GraniteMoeConfig, ModelError, read_json

DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "tokenizer*")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Where huggingface_hub keeps a commit of a repository. Names there have no double dashes of their own.
SNAPSHOT = re.compile(r".*/models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})")
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
# The library's own limit; above it no reader opens the file.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS, MAX_SIZE = 8, 2**53
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

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file. `dtype` is safetensors' name for it (F32, BF16, ...)."""

    name: str
    file: Path
    dtype: str
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 0)


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


def resolve_model(model: str, known: str = "") -> Path:
    """The directory of MODEL: itself, or where the Hub's copy lies after a download. Raises ModelError.

    `known` is where actors that live have it from: of a model of the Hub they go on with that commit, whatever the Hub
    has by now.
    """
    if is_commit_of(model, known):
        return Path(known)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"model={model!r} is a file: give the directory that holds config.json and the weights")
    if not HUB_ID.fullmatch(model):
        raise ModelError(
            f"model={model!r} is no directory, and no Hub id (owner/name): give a directory in Hugging Face layout, "
            "a Hub id such as ibm-granite/granite-3.1-1b-a400m-instruct, or `demo`"
        )
    return _download(model)


def is_commit_of(model: str, path: str) -> bool:
    """Whether the directory holds a commit of the repository `model` of the Hub."""
    found = SNAPSHOT.fullmatch(path)
    return found is not None and model == f"{found['owner']}/{found['name']}" and not Path(model).is_dir()


def local_copy(path: str) -> Path:
    """A checkpoint's directory on this machine. A commit of the Hub that another machine has downloaded is downloaded
    here as well. Raises ModelError.
    """
    found = SNAPSHOT.fullmatch(path)
    if Path(path).is_dir() or found is None:
        return Path(path)
    return _download(f"{found['owner']}/{found['name']}", found["commit"])


def _download(hub_id: str, commit: str | None = None) -> Path:
    # Imported late: a local directory must work without network libraries being touched.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=list(DOWNLOADED)))
    except GatedRepoError:
        raise ModelError(f"model={hub_id!r} is gated: accept its terms on huggingface.co and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"model={hub_id!r} is neither a directory here nor a model on the Hub that you may read: "
            "check the spelling, or set HF_TOKEN for a private one"
        ) from None
    except Exception as error:
        raise ModelError(
            f"model={hub_id!r} is no directory here and can't be fetched from the Hub "
            f"({type(error).__name__}: {error}): check the network, or download it elsewhere and give its directory"
        ) from None


def read_headers(model_dir: Path) -> dict[str, TensorInfo]:
    """All tensors of `model.safetensors`, or of the shards in `model.safetensors.index.json`, by name.

    Raises ModelError that names the file or the tensor.
    """
    single, index = model_dir / "model.safetensors", model_dir / "model.safetensors.index.json"
    if single.exists():
        return dict(_read_header(single))
    if not index.exists():
        raise ModelError(
            f"{model_dir} holds neither model.safetensors nor model.safetensors.index.json: "
            "save the weights as safetensors (transformers: model.save_pretrained)"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(f"{index} has no weight_map from tensor names to files")
    # `.name`: an index must not lead out of its directory.
    found = {file: dict(_read_header(model_dir / Path(file).name)) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in found[file]:
            raise ModelError(f"{index} says that {name} is in {file}, but it is not: download the checkpoint again")
    return {name: found[file][name] for name, file in weight_map.items()}


def _read_header(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    try:
        status = file.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{file} is not a safetensors file: it is no regular file")
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelError(
                    f"{file} is cut off: it has {size} bytes, its header alone needs {length + 8}: download it again"
                )
            if length > MAX_HEADER_BYTES:
                raise ModelError(f"{file}: its header has {length:,} bytes, safetensors allows {MAX_HEADER_BYTES:,}")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise ModelError(f"{file} is missing: download the checkpoint again") from None
    except ModelError:
        raise
    except (OSError, *MALFORMED) as error:
        raise ModelError(f"{file} is not a safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise ModelError(f"{file} is not a safetensors file: its header is not a JSON object")
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, _tensor_info(name, entry, file, size - 8 - length)


def _tensor_info(name: str, entry: Any, file: Path, data_bytes: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        is_sound = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound or any(type(n) is not int or abs(n) > MAX_SIZE for n in (*shape, begin, end)):
        raise ModelError(f"{file}: the header's entry for {name:.200} is malformed: {entry!r:.200}")
    info = TensorInfo(name, file, dtype, tuple(shape))
    if not 0 <= begin <= end <= data_bytes:
        raise ModelError(
            f"{file} is cut off: {name} ends at byte {end} of the data, the file has {data_bytes}: download it again"
        )
    if info.dtype in ITEM_BYTES and info.num_bytes != end - begin:
        raise ModelError(f"{file}: {name} is {info.dtype} {list(info.shape)} but takes {end - begin} bytes")
    return info


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
