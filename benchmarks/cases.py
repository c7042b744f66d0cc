"""What is measured in an engine without HTTP: decode steps and prompts, and what each must cost at least."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.lanes import INT8
from cluster.models.spec import ModelSpec
from cluster.planning.cost import Cost, step_cost

# Tokens of a step at most: longer prompts take several.
BUDGET = 512


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: its tokens, what it costs at least on a lane, a function of the engine that returns seconds."""

    num_tokens: int
    cost: Callable[[str], Cost]
    run: Callable[[Any], float]


def decode(engine: Any, batch: int, steps: int, context: int) -> float:
    """Seconds per step of `batch` sequences, after their prompts of `context` tokens are in the cache."""
    from cluster.messages.requests import GenerationRequest, SamplingParams

    params = SamplingParams(max_tokens=steps + 8, temperature=0.0)
    for i in range(batch):
        engine.add(GenerationRequest(str(i), "", tuple((7 * i + j) % 4000 + 300 for j in range(context)), params))
    while any(s.num_output < 2 for s in engine.sequences.values()):
        engine.step()
    return _timed_steps(engine, steps)


def _timed_steps(engine: Any, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        engine.step()
    seconds = (time.perf_counter() - started) / steps
    for request_id in tuple(engine.sequences):
        engine.abort(request_id)
    return seconds


def prefill(engine: Any, length: int) -> float:
    """Seconds to compute a prompt of `length` tokens and its first new token."""
    from cluster.messages.requests import GenerationRequest, SamplingParams

    prompt = tuple(j % 4000 + 300 for j in range(length))
    engine.add(GenerationRequest("p", "", prompt, SamplingParams(max_tokens=1, temperature=0.0)))
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started


def make_cases(
    spec: ModelSpec, batches: list[int], prompts: list[int], steps: int, context: int, itemsize: int
) -> dict[str, Case]:
    def cost(passes: list[list[tuple[int, int]]], lane: str) -> Cost:
        """Of all passes over the weights: in each, sequences of (new tokens, context)."""
        expert_itemsize = 1 if lane.endswith(INT8) else itemsize
        return sum((step_cost(spec, each, itemsize, expert_itemsize) for each in passes), Cost(0, 0))

    cases = {}
    for batch in batches:
        passes = [[(1, context + steps // 2)] * batch]
        cases[f"decode {batch}"] = Case(
            batch, partial(cost, passes), partial(decode, batch=batch, steps=steps, context=context)
        )
    for length in prompts:
        chunks = [(min(BUDGET, length - start), min(length, start + BUDGET)) for start in range(0, length, BUDGET)]
        cases[f"prefill {length}"] = Case(
            length, partial(cost, [[chunk] for chunk in chunks]), partial(prefill, length=length)
        )
    return cases
