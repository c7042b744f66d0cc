"""What int8 experts cost in quality: the demo model scores the answers of its FAQ, and answers every question of it.

    python -m benchmarks.quality [--out FILE]

The same prompts with experts in bfloat16 and in int8, everything else bfloat16, and once all in float32. Perplexity and
top-1 agreement are over the tokens of the true answers, given all that comes before them; agreement is with bfloat16.
Answers are greedy, to phrasings that the model has learned; they are right if every token is.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from actors.compute import Compute, describe
from benchmarks.lanes import local_dispatcher, make_engine
from benchmarks.report import environment, table
from cluster.messages.actors import ExpertDtype
from cluster.messages.requests import GenerationRequest, RequestOutput, SamplingParams
from cluster.models.checkpoint import Checkpoint
from deploy.demo import MODEL_DIR
from deploy.demo.training.faq import load_faq
from deploy.ingress.text.tokens import Tokenizer

WAYS: tuple[tuple[str, str, ExpertDtype], ...] = (
    ("bfloat16", "bfloat16", "auto"),
    ("int8", "bfloat16", "int8"),
    ("float32", "float32", "auto"),
)


@dataclass(frozen=True, slots=True)
class Question:
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    experts: str
    perplexity: float
    top1_agreement: float
    right_answers: int
    num_questions: int


def questions(tokenizer: Tokenizer, end: tuple[int, ...]) -> list[Question]:
    """Every phrasing of the FAQ that was trained on, as the ids of a chat; answers end with `end`."""
    return [
        Question(
            tuple(tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": text}]), False)),
            (*tokenizer.encode(entry.answer, False), *end),
        )
        for entry in load_faq()
        for text in entry.questions
    ]


def run(engine: Any, prompts: list[tuple[int, ...]], params: list[SamplingParams]) -> list[list[RequestOutput]]:
    """Each prompt's outputs."""
    requests = [GenerationRequest(str(i), "", *each) for i, each in enumerate(zip(prompts, params, strict=True))]
    outputs: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return list(outputs.values())


def scored(engine: Any, asked: list[Question]) -> tuple[float, list[int]]:
    """Mean log-probability of the answers' tokens, and what the model thinks the likeliest at each of their places."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    found = run(engine, [q.prompt + q.answer for q in asked], [params] * len(asked))
    scores = [
        score
        for question, outputs in zip(asked, found, strict=True)
        for score in (outputs[0].prompt_logprobs or ())[-len(question.answer) :]
        if score
    ]
    return sum(score.logprob for score in scores) / len(scores), [score.top[0][0] for score in scores]


def num_right(engine: Any, asked: list[Question]) -> int:
    params = [SamplingParams(max_tokens=len(question.answer), temperature=0.0) for question in asked]
    found = run(engine, [question.prompt for question in asked], params)
    return sum(
        tuple(token for output in outputs for token in output.token_ids) == question.answer
        for question, outputs in zip(asked, found, strict=True)
    )


def main(out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None) -> None:
    """Measure the demo model."""
    checkpoint = Checkpoint.open(MODEL_DIR)
    asked = questions(Tokenizer.load(MODEL_DIR), checkpoint.spec.eos_token_ids[:1])
    figures: list[Figure] = []
    reference: list[int] = []
    for name, dtype, experts in WAYS:
        compute = Compute.choose("cpu", dtype, "auto", experts)
        engine = make_engine(checkpoint, compute, 32 * 1024, 2048)
        engine.dispatcher = local_dispatcher(checkpoint, compute)
        logprob, likeliest = scored(engine, asked)
        reference = reference or likeliest
        agreement = sum(a == b for a, b in zip(likeliest, reference, strict=True)) / len(reference)
        figures.append(Figure(name, math.exp(-logprob), agreement, num_right(engine, asked), len(asked)))
    int8 = Compute.choose("cpu", "bfloat16", "auto", "int8")
    print("; ".join(describe(int8, "auto")), f"{len(reference)} tokens of answers", sep="; ")
    table(
        ("experts", "perplexity", "top-1 as bfloat16", "right answers"),
        [
            (f.experts, f"{f.perplexity:.5f}", f"{f.top1_agreement:.2%}", f"{f.right_answers} of {f.num_questions}")
            for f in figures
        ],
    )  # fmt: skip
    if out:
        out.write_text(
            json.dumps({"environment": environment(), "figures": [asdict(f) for f in figures]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
