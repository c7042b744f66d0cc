"""Write a random-weight checkpoint in the shape of a published model: `python -m benchmarks.make_checkpoint SHAPE OUT`.

Such a model talks nonsense at the speed of the real one. Tensors are written piece by piece, so memory stays small, and
into shards of the size of the Hub's.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from benchmarks.byte_tokenizer import write_tokenizer
from cluster.models.checkpoint import needed_tensors
from cluster.models.family import parse_config

# Content of config.json: widths and depths of published models (shapes.json says of which).
SHAPES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shapes.json").read_text())
PIECE = 1 << 22
SHARD_BYTES = 4 << 30

Tensors = list[tuple[str, tuple[int, ...]]]


def make_checkpoint(shape: str, out: Path, layers: int | None = None, seed: int = 0) -> None:
    write_checkpoint(cut(SHAPES[shape], layers) if layers else SHAPES[shape], out, seed)


def write_checkpoint(raw: dict[str, Any], out: Path, seed: int = 0) -> None:
    """Of the content of a config.json."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(raw, indent=2))
    write_tokenizer(out, raw["vocab_size"])
    shards = list(shards_of([(names[0], shape) for _, names, shape in needed_tensors(parse_config(raw))]))
    number = len(shards)
    files = [
        f"model-{i + 1:05}-of-{number:05}.safetensors" if number > 1 else "model.safetensors" for i in range(number)
    ]
    generator = torch.Generator().manual_seed(seed)
    for name, tensors in zip(files, shards, strict=True):
        with (out / name).open("wb") as file:
            file.write(safetensors_header(tensors))
            for tensor, tensor_shape in tensors:
                write_random(file, tensor, tensor_shape, raw.get("embedding_multiplier", 1.0), generator)
    if number > 1:
        weight_map = {tensor: name for name, tensors in zip(files, shards, strict=True) for tensor, _ in tensors}
        total = sum(2 * math.prod(shape) for tensors in shards for _, shape in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(raw: dict[str, Any], layers: int) -> dict[str, Any]:
    """The first layers alone; lists that tell of each layer are cut as well."""
    number = raw["num_hidden_layers"]
    per_layer = {k: v[:layers] for k, v in raw.items() if isinstance(v, list) and len(v) == number}
    return raw | per_layer | {"num_hidden_layers": layers}


def shards_of(tensors: Tensors) -> Iterator[Tensors]:
    """In their order, as many as fit into a shard."""
    shard: Tensors = []
    room = SHARD_BYTES
    for name, shape in tensors:
        room -= 2 * math.prod(shape)
        if room < 0 and shard:
            yield shard
            shard, room = [], SHARD_BYTES - 2 * math.prod(shape)
        shard.append((name, shape))
    yield shard


def safetensors_header(tensors: Tensors) -> bytes:
    """Header of a bf16 file that holds the tensors one after the other."""
    entries, end = {}, 0
    for name, shape in tensors:
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_random(
    file: BinaryIO, name: str, shape: tuple[int, ...], embedding_multiplier: float, generator: torch.Generator
) -> None:
    """Norms are 1. The rest is normal noise: sharp enough that outputs vary, so small that nothing overflows; the
    embedding is small, for with a tied head a large one would only repeat the last token."""
    if "norm" in name:
        mean, std = 1.0, 0.0
    elif "embed_tokens" in name:
        mean, std = 0.0, 0.3 / embedding_multiplier
    else:
        mean, std = 0.0, 2.0 / math.sqrt(shape[-1])
    for count in pieces(math.prod(shape)):
        piece = torch.randn(count, generator=generator) * std + mean
        file.write(piece.bfloat16().view(torch.int16).numpy().data)


def pieces(total: int) -> Iterator[int]:
    for start in range(0, total, PIECE):
        yield min(PIECE, total - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the published model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_checkpoint(args.shape, args.out, args.layers, args.seed)


if __name__ == "__main__":
    main()
