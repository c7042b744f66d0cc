"""Write a random-weight checkpoint in the shape of a published model: `python -m benchmarks.make_checkpoint SHAPE OUT`.

Such a model talks nonsense at the speed of the real one. Tensors are written piece by piece, so memory stays small.
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


def make_checkpoint(shape: str, out: Path, layers: int | None = None, seed: int = 0) -> None:
    raw = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(raw, indent=2))
    write_tokenizer(out, raw["vocab_size"])
    tensors = [(names[0], shape) for _, names, shape in needed_tensors(parse_config(raw))]
    with (out / "model.safetensors").open("wb") as file:
        file.write(safetensors_header(tensors))
        generator = torch.Generator().manual_seed(seed)
        for name, tensor_shape in tensors:
            write_random(file, name, tensor_shape, raw.get("embedding_multiplier", 1.0), generator)


def safetensors_header(tensors: list[tuple[str, tuple[int, ...]]]) -> bytes:
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
