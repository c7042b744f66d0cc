"""`prompt_embeds` of completions, and embeddings as answers.

A prompt comes as vLLM's field does, but as safetensors: nothing in it is ever run. One tensor, of shape (tokens, hidden
size).
"""

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from cluster.messages.requests import EmbedsDtype, PromptEmbeds
from deploy.ingress.openai.answer_json import Base64, Rows
from deploy.ingress.openai.errors import invalid_request

FIELD = "prompt_embeds"
DTYPES: dict[str, EmbedsDtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SIZES: dict[EmbedsDtype, int] = dict(zip(get_args(EmbedsDtype), (4, 2, 2), strict=True))
MAX_HEADER_BYTES = 10_000
# float16 holds no more; what models compute with stays finite.
MOST = 65504.0

Vector = np.ndarray[Any, np.dtype[np.float32]]


def as_prompt_embeds(value: Any) -> list[PromptEmbeds]:
    """One prompt, or several: base64 of safetensors."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be base64 of a safetensors file, or a list of such texts")
    return [_read(text) for text in texts]


def _read(text: str) -> PromptEmbeds:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it is not base64") from None
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > min(MAX_HEADER_BYTES, len(raw) - 8):
        raise ValueError(f"it is no safetensors file with a header of at most {MAX_HEADER_BYTES} bytes")
    try:
        header = json.loads(raw[8 : 8 + size])
        [tensor] = [value for name, value in header.items() if name != "__metadata__"]
        dtype, (num_tokens, width), (begin, end) = DTYPES[tensor["dtype"]], tensor["shape"], tensor["data_offsets"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(
            f"it must hold one tensor of shape [tokens, hidden size] and type {', '.join(DTYPES)}"
        ) from None
    data = raw[8 + size :]
    if any(type(n) is not int or n < 1 for n in (num_tokens, width)):
        raise ValueError(f"its shape {[num_tokens, width]!r:.60} must be [tokens, hidden size]")
    if (begin, end) != (0, len(data)) or num_tokens * width * SIZES[dtype] != len(data):
        raise ValueError(f"its shape {[num_tokens, width]!r:.60} and its {len(data)} bytes of data do not agree")
    if not _is_sane(data, dtype):
        raise ValueError(f"its numbers must be finite, and at most {MOST:g}")
    return PromptEmbeds((num_tokens, width), dtype, data)


def _is_sane(data: bytes, dtype: EmbedsDtype) -> bool:
    if dtype == "bfloat16":  # the upper half of a float32
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, f"<f{SIZES[dtype]}")
    return bool((np.abs(values) <= MOST).all())  # NaN is not


def check_width(embeds: Sequence[PromptEmbeds], hidden_size: int) -> None:
    """Raises APIError (400)."""
    for each in embeds:
        if each.shape[1] != hidden_size:
            raise invalid_request(f"{FIELD} has width {each.shape[1]}: this model's is {hidden_size}", FIELD)


def shaped(embedding: bytes, dimensions: int | None, normalize: bool) -> Vector:
    """The first `dimensions` of a pooled hidden state, of length 1 if wanted."""
    vector = np.frombuffer(embedding, np.float32)[:dimensions].astype(np.float64)
    length = float(np.linalg.norm(vector)) if normalize else 1.0
    return (vector / length if length else vector).astype(np.float32)


def check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    """Raises APIError (400)."""
    if dimensions is not None and dimensions > hidden_size:
        raise invalid_request(f"dimensions={dimensions} is more than the model's {hidden_size}", "dimensions")


def embeddings_json(vectors: Sequence[Vector], is_base64: bool, model: str, num_tokens: int) -> dict[str, Any]:
    """OpenAI's answer, for dump()."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": Base64(vector.astype("<f4").tobytes()) if is_base64 else Rows(vector.tolist(), float),
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}
