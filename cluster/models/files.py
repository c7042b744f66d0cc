"""Reading what strangers wrote: small files and JSON of a checkpoint, with limits."""

import json
import stat
from pathlib import Path
from typing import Any

from cluster.errors import ModelError

# Those with weights of the largest models have a few MiB.
MAX_JSON_BYTES = 64 * 2**20
# What reading JSON of a stranger may raise; RecursionError for brackets, OverflowError for numbers.
MALFORMED = (ValueError, RecursionError, OverflowError, MemoryError)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ModelError that names the file."""
    try:
        content = json.loads(read_file(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: MODEL must be a directory in Hugging Face layout") from None
    except (OSError, *MALFORMED) as error:
        raise ModelError(f"{path} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object")
    return content


def read_file(path: Path, most: int) -> str:
    """The text of a file of a checkpoint. Raises OSError, or ValueError if it is no text of at most `most` bytes."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content.decode("utf-8")
