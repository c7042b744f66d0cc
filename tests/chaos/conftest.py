"""The model that chaos tests serve, and the tokens that it must give whatever happens.

A small one whose tokens transformers tells, with a layer without experts and a shared expert in the others; CHAOS_MODEL
names another checkpoint, whose tokens are those of an undisturbed run. CHAOS_TOKENS: how many of them a request asks
for.
"""

import os
from pathlib import Path

import pytest

from deploy.ingress.text.tokens import Tokenizer
from tests.chaos.load import LETTERS, Load
from tests.checkpoints import generate, load_reference, write_checkpoint
from tests.e2e.servers import serving
from tests.families import FAMILIES

MODEL = os.environ.get("CHAOS_MODEL")
TOKENS = int(os.environ.get("CHAOS_TOKENS", "32"))
CLIENTS = 16
# The longest is computed in several chunks: faults hit prefill and decode.
PROMPTS = [[(11 * i + 7 * j) % 250 for i in range(length)] for j, length in enumerate((5, 30, 180, 12))]
FLAGS = ("--dtype", "float32", "--max-num-batched-tokens", "64")


@pytest.fixture(scope="package")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if MODEL:
        return Path(MODEL)
    return write_checkpoint(FAMILIES["qwen2_moe"]["qwen2_moe-dense"], tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="package")
def expected(model_dir: Path) -> list[list[int]]:
    """The answer to each prompt."""
    if MODEL:
        with serving(model_dir, "--groups", "2", *FLAGS) as server, Load(server, len(PROMPTS), TOKENS, PROMPTS) as load:
            load.wait_for(1)
        return [stream.answers[0] for stream in load.streams]
    reference = load_reference(model_dir)
    letters = Tokenizer.load(model_dir).encode(LETTERS)
    allowed = [None] * (len(PROMPTS) - 1) + [letters]
    return [generate(reference, prompt, TOKENS, ids) for prompt, ids in zip(PROMPTS, allowed, strict=True)]
