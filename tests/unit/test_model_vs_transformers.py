"""The two halves against transformers' GraniteMoeForCausalLM: same tokens, same log-probabilities, same routing."""

import dataclasses
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.compute import Compute
from actors.dispatch.local import LocalDispatcher
from actors.experts.loading import load_experts
from actors.kernels import native
from actors.model import attention
from actors.model.batch import Span, StepBatch
from actors.model.loading import load_front
from actors.model.paged_kv import PagedKV
from actors.weights import Weights
from cluster.messages.actors import KernelChoice
from cluster.models.checkpoint import Checkpoint
from tests.checkpoints import MODELS, TinyModel, generate, load_reference, write_checkpoint
from tests.families import OLMOE, QWEN2, QWEN3, SWA
from tests.specs import PLAIN

BLOCK_SIZE = 4
NUM_NEW = 14
PROMPTS = ([17, 200, 33, 5, 91, 140, 7, 7, 250, 61, 12, 99, 180], list(range(40, 98, 2)))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


@dataclass
class Sequence:
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)


class Runner:
    """The smallest engine: packs the given number of new tokens of each sequence into a step, keeps all logits."""

    def __init__(self, model_dir: Path, compute: Compute = PLAIN) -> None:
        checkpoint = Checkpoint.open(model_dir)
        weights = Weights(checkpoint, compute)
        self.front = load_front(weights)
        self.dispatcher = LocalDispatcher(load_experts(weights, checkpoint.all_experts))
        self.kv = PagedKV(checkpoint.spec, 64, BLOCK_SIZE, compute)
        for cache in (self.kv.k_LBSGC, self.kv.v_LBSGC):
            cache.fill_(float("nan"))  # whatever reads a slot that was not written shows
        self.free = random.Random(0).sample(range(64), 64)

    def step(self, work: list[tuple[Sequence, int]]) -> None:
        work = sorted(work, key=lambda item: item[1] > 1)
        batch = self._batch(work)
        hidden_RD, _ = self.front.forward(batch, self.kv, self.dispatcher)
        for (sequence, count), logits in zip(
            work, self.front.logits(hidden_RD).split([n for _, n in work]), strict=True
        ):
            sequence.computed += count
            sequence.logits += logits.unbind()
            if sequence.computed == len(sequence.tokens):
                sequence.tokens.append(int(logits[-1].argmax()))

    def _batch(self, work: list[tuple[Sequence, int]]) -> StepBatch:
        tokens, positions, slots, spans = [], [], [], []
        for sequence, count in work:
            context = sequence.computed + count
            while len(sequence.blocks) * BLOCK_SIZE < context:
                sequence.blocks.append(self.free.pop())
            spans.append(Span(len(tokens), count, context))
            for at in range(sequence.computed, context):
                tokens.append(sequence.tokens[at])
                positions.append(at)
                slots.append(sequence.blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE)
        width = max(len(sequence.blocks) for sequence, _ in work)
        blocks = torch.zeros(len(work), width, dtype=torch.int32)
        for row, (sequence, _) in enumerate(work):
            blocks[row, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
        packed = (torch.tensor(numbers) for numbers in (tokens, positions, slots))
        return StepBatch(*packed, blocks, torch.arange(len(tokens)), tuple(spans))

    def run(self, prompt: list[int], chunks: list[int]) -> Sequence:
        """Prefill in chunks, then decode, alone in the batch."""
        sequence = Sequence(list(prompt))
        for count in chunks:
            self.step([(sequence, count)])
        while len(sequence.tokens) < len(prompt) + NUM_NEW:
            self.step([(sequence, 1)])
        return sequence


@pytest.fixture(scope="module", params=MODELS)
def model_dir(request, tmp_path_factory) -> Path:
    return write_checkpoint(MODELS[request.param], tmp_path_factory.mktemp(request.param))


def routed_by(reference, tokens: list[int]) -> torch.Tensor:
    router_logits = reference(torch.tensor([tokens]), output_router_logits=True).router_logits
    top_k = reference.config.num_experts_per_tok
    return torch.stack([logits.topk(top_k).indices for logits in router_logits], dim=1)


def assert_same_as_reference(sequence: Sequence, prompt: list[int], reference, runner: Runner) -> None:
    expected = generate(reference, prompt, NUM_NEW)
    assert len(set(expected)) >= 8, "a model that repeats itself would hide mistakes"
    assert sequence.tokens[len(prompt) :][:NUM_NEW] == expected

    computed = sequence.tokens[: sequence.computed]
    ours = torch.stack(sequence.logits).log_softmax(-1)
    theirs = reference(torch.tensor([computed])).logits[0].log_softmax(-1)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)

    slots = [sequence.blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in range(len(computed))]
    assert torch.equal(runner.kv.read_routed(torch.tensor(slots)).long(), routed_by(reference, computed))


def test_batched_chunked_paged_equals_transformers(model_dir: Path):
    reference, runner = load_reference(model_dir), Runner(model_dir)
    short, long = (Sequence(list(prompt)) for prompt in PROMPTS)
    # A whole prompt beside a chunk, then decodes beside odd chunks (one of a single token), then decodes together.
    runner.step([(long, 7), (short, len(PROMPTS[0]))])
    for count in (1, 11, 3, 7):
        runner.step([(long, count), (short, 1)])
    while len(long.tokens) < len(PROMPTS[1]) + NUM_NEW:
        runner.step([(short, 1), (long, 1)])
    assert_same_as_reference(short, PROMPTS[0], reference, runner)
    assert_same_as_reference(long, PROMPTS[1], reference, runner)


def test_a_sequence_does_not_depend_on_its_company(tmp_path: Path):
    runner = Runner(write_checkpoint(MODELS["granite"], tmp_path))
    alone = runner.run(PROMPTS[0], chunks=[5, 8])
    crowd = [Sequence(list(prompt)) for prompt in (PROMPTS[1], PROMPTS[0], PROMPTS[0][::-1])]
    runner.step([(sequence, len(sequence.tokens)) for sequence in crowd])
    for _ in range(NUM_NEW - 1):
        runner.step([(sequence, 1) for sequence in crowd])
    assert crowd[1].tokens == alone.tokens
    torch.testing.assert_close(torch.stack(crowd[1].logits), torch.stack(alone.logits), atol=1e-5, rtol=0)


def test_a_step_may_want_no_logits(tmp_path: Path):
    runner = Runner(write_checkpoint(MODELS["granite"], tmp_path))
    batch = dataclasses.replace(
        runner._batch([(Sequence(list(PROMPTS[1])), 8)]), rows_R=torch.empty(0, dtype=torch.int64)
    )
    hidden_RD, ids_TLK = runner.front.forward(batch, runner.kv, runner.dispatcher)
    assert runner.front.logits(hidden_RD).shape == (0, 264)
    assert ids_TLK.shape == (8, 6, 2)
    assert ids_TLK.dtype == torch.uint8


@given(st.lists(st.integers(1, 300), max_size=30), st.integers(1, 1000))
def test_decodes_are_gathered_with_little_padding(contexts: list[int], limit: int):
    spans = tuple(Span(number, 1, context) for number, context in enumerate(contexts))
    groups = list(attention.group_by_length(spans, limit))
    assert sorted(number for group in groups for number in group) == list(range(len(contexts)))
    for group in groups:
        lengths = [contexts[number] for number in group]
        assert max(lengths) < 2 * min(lengths)
        assert len(group) == 1 or max(lengths) * len(group) <= limit


# In each every expert is chosen: rounding can't flip the router's choice, which would make any comparison loose.
ALL = {"num_experts_per_tok": 8}
BFLOAT16 = {
    "granite": MODELS["all-experts"],
    "windows-sinks-shared": TinyModel(
        SWA | ALL | {"shared_intermediate_size": 24, "layer_rope_theta": [0, 1e4, 1e3, 0]}, family="granitemoe_swa"
    ),
    "norms-dense": TinyModel(QWEN3 | ALL | {"mlp_only_layers": [1]}, family="qwen3_moe"),
    "gated-shared": TinyModel(QWEN2 | ALL, family="qwen2_moe"),
    "clipped": TinyModel(OLMOE | ALL | {"clip_qkv": 0.8}, family="olmoe"),
}


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_stays_close_to_transformers_in_bfloat16(tmp_path: Path, kernels: KernelChoice, name: str):
    if kernels == "native" and not native.instruction_sets():
        pytest.skip("the native kernels have not been built, or this CPU has no AVX2")
    write_checkpoint(BFLOAT16[name], tmp_path)
    prompt, runner = PROMPTS[1], Runner(tmp_path, Compute.choose("cpu", "bfloat16", kernels))
    ours = torch.stack(runner.run(prompt, [12, 17]).logits[: len(prompt)])
    assert runner.front.is_native == (kernels == "native")
    exact, rounded = (
        load_reference(tmp_path, dtype)(torch.tensor([prompt])).logits[0].float()
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (ours - exact).abs().mean() < 1.2 * (rounded - exact).abs().mean()
    assert (ours - rounded).abs().mean() < 0.04 * exact.std()
