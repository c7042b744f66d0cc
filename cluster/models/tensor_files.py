"""Names, shapes and types of the tensors in a checkpoint's files, without reading one weight.

Knows the safetensors header format (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ModelError
from cluster.models.files import MALFORMED, read_json

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
# The library's own limit; above it no reader opens the file.
MAX_HEADER_BYTES = 100_000_000
# A size is written in 64 bits.
MAX_DIMENSIONS, MAX_SIZE = 8, 2**53

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file, from byte `begin` on. `dtype` is safetensors' name for it (F32, BF16, ...)."""

    name: str
    file: Path
    dtype: str
    shape: Shape
    begin: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 0)


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
            yield name, _tensor_info(name, entry, file, 8 + length, size)


def _tensor_info(name: str, entry: Any, file: Path, header_bytes: int, file_bytes: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        is_sound = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound or any(type(n) is not int or abs(n) > MAX_SIZE for n in (*shape, begin, end)):
        raise ModelError(f"{file}: the header's entry for {name:.200} is malformed: {entry!r:.200}")
    data_bytes = file_bytes - header_bytes
    info = TensorInfo(name, file, dtype, tuple(shape), header_bytes + begin)
    if not 0 <= begin <= end <= data_bytes:
        raise ModelError(
            f"{file} is cut off: {name} ends at byte {end} of the data, the file has {data_bytes}: download it again"
        )
    if info.dtype in ITEM_BYTES and info.num_bytes != end - begin:
        raise ModelError(f"{file}: {name} is {info.dtype} {list(info.shape)} but takes {end - begin} bytes")
    return info
