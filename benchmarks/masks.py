"""What structured output costs a step: 32 sequences that each keep to a grammar, and 32 that keep to none.

    python -m benchmarks.masks [--sequences 32] [--vocabulary 49155]

Logits are random, tokens are drawn at temperature 1 from what the grammar leaves; the vocabulary is made of bytes and
random words. Masks are computed beside the model, so a step waits for less of them than is shown. `sample` is all from
logits to tokens; `of a step`: of a decode step of 32 sequences of the shape 1b-a400m on the lane `local`, which
results/peers-avx512-bf16.json holds. Medians over steps.
"""

import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

os.environ["OMP_WAIT_POLICY"] = "passive"

import torch
import typer

from actors.engine.constraint import Constraint, Masks
from actors.engine.sampler import sample
from actors.engine.sequence import Sequence
from benchmarks.byte_tokenizer import END_ID, MIN_VOCAB_SIZE, write_tokenizer
from benchmarks.make_checkpoint import SHAPES
from benchmarks.report import environment, table
from cluster.messages.requests import GenerationRequest, SamplingParams
from cluster.models.grammars import Grammars
from deploy.ingress.text.grammar import GrammarWriter

STEP_OF = Path(__file__).parent / "results/peers-avx512-bf16.json"
COLUMNS = ("compile_ms", "masks_ms", "longest_ms", "sample_ms")
ITEM = {"type": "object", "properties": {"name": {"type": "string"}, "count": {"type": "integer"}}}
ASKED: dict[str, tuple[str, Any]] = {
    "any JSON object": ("json", {"type": "object"}),
    "JSON of a schema": ("json", {"type": "object", "properties": {"items": {"type": "array", "items": ITEM}}}),
    "choice of 1000": ("choice", [f"choice {n} of a thousand, or so" for n in range(1000)]),
    "regex": ("regex", "([a-z]{1,12} )*[0-9]{4}"),
}


def main(
    sequences: int = 32,
    vocabulary: int = 49155,
    steps: int = 60,
    threads: int = os.cpu_count() or 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure masks beside free sampling."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step_ms = _step_ms()
    thread = Masks()
    with tempfile.TemporaryDirectory() as directory:
        grammars = Grammars(_model_dir(Path(directory), vocabulary))
    logits_NV = torch.randn(2 * sequences, vocabulary) * 3
    kinds = {"free": _kind(grammars, "", None, sequences, vocabulary)}
    kinds |= {name: _kind(grammars, *asked, sequences, vocabulary) for name, asked in ASKED.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for number in range(steps):  # they take turns
        for name, (made, _) in kinds.items():
            times[name].append(_step(thread, made, logits_NV, number))
    figures = [_figure(name, kinds[name][1], times[name][2:], times["free"][2:], step_ms) for name in kinds]
    table(
        ("grammar", "compile, ms", f"{sequences} masks, ms", "longest", "sample, ms", "of a step"),
        [(each["grammar"], *(f"{each[key]:.2f}" for key in COLUMNS), f"{each['share']:.1%}") for each in figures],
    )
    if out:
        content = {"environment": environment(), "sequences": sequences, "vocabulary": vocabulary, "step_ms": step_ms}
        out.write_text(json.dumps(content | {"figures": figures}, indent=1) + "\n")


def _kind(grammars: Grammars, kind: str, value: Any, sequences: int, vocabulary: int) -> tuple[list[Sequence], float]:
    """Sequences with a grammar, and the milliseconds that it took to compile."""
    if not kind:
        return [_sequence(n, None) for n in range(sequences)], 0.0
    started = time.perf_counter()
    matcher = grammars.compile(GrammarWriter(grammars.added).write(kind, value))
    milliseconds = 1e3 * (time.perf_counter() - started)
    return [_sequence(n, Constraint(matcher.deep_copy(), vocabulary)) for n in range(sequences)], milliseconds


def _figure(
    name: str, compile_ms: float, times: list[tuple[float, float]], free: list[tuple[float, float]], step_ms: float
) -> dict[str, Any]:
    masks, samples = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    more = 1e3 * statistics.median(sum(ours) - sum(others) for ours, others in zip(times, free, strict=True))
    longest = 1e3 * max(each for each, _ in times)
    row = {"compile_ms": compile_ms, "masks_ms": masks, "longest_ms": longest, "sample_ms": samples}
    return {"grammar": name, "share": more / step_ms} | row


def _step_ms() -> float:
    figures = json.loads(STEP_OF.read_text())["figures"]
    speeds = {each["engine"]: each["tokens_per_second"] for each in figures if each["case"] == "decode 32"}
    return 1e3 * 32 / float(speeds["outcrop-local"])


def _model_dir(directory: Path, vocabulary: int) -> Path:
    """A config and a tokenizer."""
    write_tokenizer(directory, vocabulary)
    rng = random.Random(0)
    words = {"".join(rng.choices("etaoinshrdlucmfwygpbvk0123456789", k=rng.randint(2, 9))) for _ in range(vocabulary)}
    spelt = iter(sorted(words))
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    pieces = [p if i < MIN_VOCAB_SIZE else ("Ġ" * (i % 2) + next(spelt, p)) for p, i in vocab.items()]
    content["model"]["vocab"] = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    path.write_text(json.dumps(content))
    config = SHAPES["1b-a400m"] | {"vocab_size": vocabulary, "eos_token_id": END_ID}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _sequence(number: int, constraint: Constraint | None) -> Sequence:
    params = SamplingParams(max_tokens=10**6, seed=number, stop_token_ids=(END_ID,))
    return Sequence.of(GenerationRequest(str(number), "", (1,), params), constraint)


def _step(masks: Masks, made: list[Sequence], logits_NV: torch.Tensor, number: int) -> tuple[float, float]:
    """Seconds of masks, and of sampling."""
    first = number % len(made)
    logits_RV = logits_NV[first : first + len(made)]
    started = time.perf_counter()
    masks.begin([sequence for sequence in made if sequence.constraint])()
    masked = time.perf_counter()
    with torch.inference_mode():
        tokens = sample(logits_RV, made)
    ended = time.perf_counter()
    for sequence, token in zip(made, tokens, strict=True):
        if token != END_ID:  # whose grammar is at its end stays there
            sequence.token_ids.append(token)
    return masked - started, ended - masked


if __name__ == "__main__":
    typer.run(main)
