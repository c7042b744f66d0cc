"""The engine against transformers: whatever the schedule, the tokens stay the same."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.dispatch.dispatcher import DispatchError
from actors.engine.engine import Engine
from actors.engine.self_test import MAX_FAILED_STEPS, BrokenEngineError
from cluster.messages.requests import GenerationRequest, RoutedExperts, SamplingParams
from tests.checkpoints import MODELS, generate, load_reference, write_checkpoint
from tests.engines import make_engine, run

PROMPTS = [[(7 * i + 13 * j) % 250 for i in range(length)] for j, length in enumerate((5, 23, 1, 40, 17, 9))]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MODELS["granite"], tmp_path_factory.mktemp("granite"))


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[list[int]]:
    reference = load_reference(model_dir)
    return [generate(reference, prompt, GREEDY.max_tokens) for prompt in PROMPTS]


def greedy(prompts: list[list[int]]) -> dict[str, tuple[list[int], SamplingParams]]:
    return {str(i): (prompt, GREEDY) for i, prompt in enumerate(prompts)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget": 7},
        {"budget": 8, "max_num_seqs": 2},
        {"num_blocks": 24},
        {"num_blocks": 24, "budget": 9},
        {"block_size": 1, "num_blocks": 300},
        {"prefix_caching": False},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
@pytest.mark.parametrize("stagger", [0, 2])
def test_schedule_never_changes_greedy_tokens(
    model_dir: Path, expected: list[list[int]], options: dict[str, Any], stagger: int
) -> None:
    engine = make_engine(model_dir, **options)
    results = run(engine, greedy(PROMPTS), stagger)
    assert [results[str(i)].token_ids for i in range(len(PROMPTS))] == expected
    assert engine.scheduler.allocator.num_used == 0
    if options.get("num_blocks") == 24:
        assert engine.scheduler.num_preemptions > 0, "the test is meant to preempt"


def test_prefix_cache_hit_gives_the_same_tokens(model_dir: Path, expected: list[list[int]]) -> None:
    engine = make_engine(model_dir)
    cold = run(engine, greedy([PROMPTS[3]]))["0"]
    warm = run(engine, greedy([PROMPTS[3]]))["0"]
    assert cold.token_ids == warm.token_ids == expected[3]
    assert cold.last.num_cached_tokens == 0
    assert warm.last.num_cached_tokens == 36  # 40 tokens are 10 blocks of 4; the last token is always computed


def test_seeded_sampling_does_not_depend_on_the_schedule(model_dir: Path) -> None:
    params = [
        SamplingParams(max_tokens=20, seed=i, temperature=0.9, top_p=[1.0, 0.8][i % 2], top_k=[0, 20, 0][i % 3])
        for i in range(len(PROMPTS))
    ]
    requests = {str(i): (prompt, params[i]) for i, prompt in enumerate(PROMPTS)}
    alone = {name: run(make_engine(model_dir), {name: request})[name].token_ids for name, request in requests.items()}
    together = run(make_engine(model_dir, budget=9, num_blocks=24), requests, stagger=1)
    assert {name: result.token_ids for name, result in together.items()} == alone
    assert len({tuple(tokens) for tokens in alone.values()}) == len(alone)


def test_replay_from_emitted_tokens_continues_identically(model_dir: Path) -> None:
    params = SamplingParams(max_tokens=20, seed=3, temperature=1.0)
    whole = run(make_engine(model_dir), {"a": (PROMPTS[1], params)})["a"].token_ids
    engine = make_engine(model_dir)
    engine.add(GenerationRequest("b", "test", tuple(PROMPTS[1]), params, tuple(whole[:11])))
    rest: list[int] = []
    while engine.has_work:
        rest += [token for output in engine.step() for token in output.token_ids]
    assert whole[:11] + rest == whole


@pytest.mark.parametrize("options", [{}, {"budget": 7}, {"num_blocks": 24, "budget": 16}])
def test_prompt_logprobs_match_transformers(model_dir: Path, options: dict[str, int]) -> None:
    reference = load_reference(model_dir)
    params = SamplingParams(max_tokens=8, temperature=0.0, prompt_logprobs=2, logprobs=3)
    engine = make_engine(model_dir, **options)
    run(engine, greedy([PROMPTS[3]]))  # fills the prefix cache, which a scored prompt must not use
    results = run(engine, {str(i): (prompt, params) for i, prompt in enumerate(PROMPTS)})
    for name, result in results.items():
        prompt = PROMPTS[int(name)]
        tokens = prompt + result.token_ids
        with torch.no_grad():
            wanted = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
        scores = result.outputs[0].prompt_logprobs
        assert scores is not None
        assert scores[0] is None
        given = [*scores[1:], *(score for output in result.outputs for score in output.logprobs)]
        assert len(given) == len(tokens) - 1
        for position, score in enumerate(given):
            assert score is not None
            assert score.token_id == tokens[position + 1]
            assert score.logprob == pytest.approx(float(wanted[position, score.token_id]), abs=1e-4)
            assert score.top[0][1] == pytest.approx(float(wanted[position].max()), abs=1e-4)
            assert (score.rank == 1) == (score.top[0][0] == score.token_id)


def test_scoring_without_generation(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    result = run(engine, {"a": (PROMPTS[1], SamplingParams(max_tokens=0, prompt_logprobs=0))})["a"]
    assert result.token_ids == []
    assert result.last.finish_reason == "length"
    assert result.last.prompt_logprobs is not None
    assert len(result.last.prompt_logprobs) == len(PROMPTS[1])


def test_routed_experts_are_the_router_s_choice(model_dir: Path) -> None:
    reference = load_reference(model_dir)
    params = SamplingParams(max_tokens=4, temperature=0.0, return_routed_experts=True)
    engine = make_engine(model_dir, budget=9)
    for _ in range(2):  # the second time most of the prompt comes from the prefix cache
        result = run(engine, {"a": (PROMPTS[3], params)})["a"]
        tokens = PROMPTS[3] + result.token_ids[:-1]
        with torch.no_grad():
            logits = reference(torch.tensor([tokens]), output_router_logits=True).router_logits
        wanted = torch.stack([layer.topk(2, dim=-1).indices for layer in logits], dim=1)
        routed = RoutedExperts.joined([output.routed_experts for output in result.outputs if output.routed_experts])
        assert routed.shape == (len(tokens), 6, 2)
        given = torch.frombuffer(bytearray(routed.data), dtype=torch.uint8).view(routed.shape)
        assert torch.equal(given.long().sort(-1).values, wanted.sort(-1).values)


def test_routed_experts_are_reported_once_whatever_happens_to_the_sequence(model_dir: Path) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.0, return_routed_experts=True)
    requests = {str(i): (prompt, params) for i, prompt in enumerate(PROMPTS)}

    def routed(**options: int) -> dict[str, list[RoutedExperts]]:
        engine = make_engine(model_dir, **options)
        results = run(engine, requests)
        assert bool(engine.scheduler.num_preemptions) == bool(options), "the test is meant to preempt"
        return {name: [o.routed_experts for o in r.outputs if o.routed_experts] for name, r in results.items()}

    plenty, scarce = routed(), routed(num_blocks=24, budget=9)
    for name, pieces in scarce.items():
        assert [piece.shape[0] for piece in pieces] == [len(requests[name][0]), *[1] * 23]
        assert RoutedExperts.joined(pieces) == RoutedExperts.joined(plenty[name])


def test_expert_counts_add_up(model_dir: Path) -> None:
    engine = make_engine(model_dir, prefix_caching=False)
    results = run(engine, greedy(PROMPTS[:2]))
    computed = sum(len(PROMPTS[i]) + len(results[str(i)].token_ids) - 1 for i in range(2))
    assert engine.expert_counts.sum(dim=1).tolist() == [2 * computed] * 6


def test_abort_at_random_times_leaks_nothing(model_dir: Path, expected: list[list[int]]) -> None:
    rng = random.Random(1)
    engine = make_engine(model_dir, num_blocks=24, budget=9)
    for round_number in range(5):
        names = {str(i): f"{round_number}-{i}" for i in range(len(PROMPTS))}
        for i, prompt in enumerate(PROMPTS):
            engine.add(GenerationRequest(names[str(i)], "test", tuple(prompt), GREEDY))
        survivor: list[int] = []
        while engine.has_work:
            for output in engine.step():
                if output.request_id == names["1"]:
                    survivor += output.token_ids
            victim = names[str(rng.choice([0, 2, 3, 4, 5]))]
            if rng.random() < 0.3:
                engine.abort(victim)
            engine.check_integrity()
        assert survivor == expected[1]
    assert engine.scheduler.allocator.num_used == 0


def test_a_failing_step_ends_its_sequences_and_nothing_else(model_dir: Path, expected: list[list[int]]) -> None:
    engine = make_engine(model_dir)
    engine.add(GenerationRequest("a", "test", tuple(PROMPTS[0]), GREEDY))
    working = engine.dispatcher
    engine.dispatcher = None  # type: ignore[assignment]
    (output,) = engine.step()
    assert output.finish_reason == "error"
    assert output.error is not None
    engine.check_integrity()
    engine.dispatcher = working
    assert run(engine, greedy([PROMPTS[0]]))["0"].token_ids == expected[0]


def test_a_scheduler_that_fails_ends_every_sequence_and_nothing_else(
    model_dir: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose fault it is can't be told, and it would fail again: they are told, blocks come back, the engine goes on."""
    engine = make_engine(model_dir, max_num_seqs=2)
    names = [str(i) for i in range(4)]
    for i, name in enumerate(names):
        engine.add(GenerationRequest(name, "test", tuple(PROMPTS[i]), GREEDY))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, "schedule", lambda: [][0])
        outputs = engine.step()
    assert sorted(output.request_id for output in outputs) == names
    assert {output.finish_reason for output in outputs} == {"error"}
    assert {output.error for output in outputs} == {"IndexError: list index out of range"}
    assert not engine.has_work
    engine.check_integrity()
    assert run(engine, greedy([PROMPTS[0]]))["0"].token_ids == expected[0]


def test_books_that_do_not_balance_end_every_sequence_too(model_dir: Path, expected: list[list[int]]) -> None:
    """Even giving blocks back fails then: the books are begun anew."""
    engine = make_engine(model_dir)
    for i in range(2):
        engine.add(GenerationRequest(str(i), "test", tuple(PROMPTS[i]), GREEDY))
    engine.step()
    engine.scheduler.allocator.free(engine.scheduler.running[0].blocks)
    outputs = [output for _ in range(GREEDY.max_tokens) if engine.has_work for output in engine.step()]
    assert {o.request_id for o in outputs if o.finish_reason == "error"} == {"0", "1"}
    engine.check_integrity()
    assert run(engine, greedy([PROMPTS[0]]))["0"].token_ids == expected[0]


def test_a_front_that_can_compute_nothing_says_so_and_fails_nobody(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that is gone: an error would reach clients, who are better served by another front."""
    engine = make_engine(model_dir)
    engine.add(GenerationRequest("a", "test", tuple(PROMPTS[0]), GREEDY))
    monkeypatch.setattr(engine.model, "logits", failing("the GPU is gone"))
    with pytest.raises(BrokenEngineError, match="the GPU is gone"):
        engine.step()
    assert engine.is_broken
    assert set(engine.sequences) == {"a"}


def test_a_front_where_nothing_succeeds_is_broken_too(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its self-test says. One step that succeeds begins the count anew."""
    engine = make_engine(model_dir)
    for good in (True, False):
        for number in range(MAX_FAILED_STEPS - 1):
            assert failed(engine, monkeypatch, RuntimeError("no sampling"), f"{good}{number}")
        if good:
            run(engine, greedy([PROMPTS[0]]))
    with pytest.raises(BrokenEngineError, match="no sampling"):
        failed(engine, monkeypatch, RuntimeError("no sampling"), "last")


def test_experts_that_nobody_computes_are_not_the_front_s_fault(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model_dir)
    for number in range(MAX_FAILED_STEPS + 1):
        assert failed(engine, monkeypatch, DispatchError("no replica"), str(number))
    assert not engine.is_broken


@pytest.mark.parametrize("emptied", [False, True])
def test_the_self_test_overwrites_nothing_that_can_be_found(
    model_dir: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, emptied: bool
) -> None:
    """All blocks that no sequence uses are cached: the one that it takes is not to be found any more. That holds for
    the books after a failure that has emptied the first ones.
    """
    engine = make_engine(model_dir, num_blocks=17)
    if emptied:
        engine.add(GenerationRequest("a", "test", tuple(PROMPTS[0]), GREEDY))
        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler, "schedule", failing("odd"))
            assert [o.finish_reason for o in engine.step()] == ["error"]
    run(engine, greedy([PROMPTS[3]]))
    assert len(engine.scheduler.allocator._free) == 2, "the failing sequence is meant to take them"
    for number in range(MAX_FAILED_STEPS - 1):
        assert failed(engine, monkeypatch, RuntimeError("odd"), str(number))
        engine.check_integrity()
    assert run(engine, greedy([PROMPTS[3]]))["0"].token_ids == expected[3]


def failed(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception, name: str) -> bool:
    """Whether a sequence ends with this error, which its step has raised."""
    engine.add(GenerationRequest(name, "test", tuple(PROMPTS[0]), GREEDY))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_postprocess", failing(error))
        return [(o.request_id, o.error) for o in engine.step()] == [(name, f"{type(error).__name__}: {error}")]


def failing(error: Exception | str) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise RuntimeError(error) if isinstance(error, str) else error

    return fail


@pytest.mark.parametrize("length", [0, 257])
def test_what_could_never_run_is_not_taken_in(model_dir: Path, length: int) -> None:
    engine = make_engine(model_dir)
    with pytest.raises(ValueError, match=rf"{length} tokens: 1 to 256 can be computed"):
        engine.add(GenerationRequest("a", "test", (1,) * length, GREEDY))
    assert not engine.has_work
    engine.check_integrity()


def test_cached_tokens_are_at_most_the_prompt_after_a_preemption(model_dir: Path) -> None:
    engine = make_engine(model_dir, num_blocks=24, budget=9)
    results = run(engine, greedy(PROMPTS))
    assert engine.scheduler.num_preemptions > 0, "the test is meant to preempt"
    assert {output.num_cached_tokens for result in results.values() for output in result.outputs} == {0}
    assert engine.scheduler.num_prefix_hits == 0


class Clock:
    """Stands still but for the experts: each of a step's tokens takes them 2.5 ms."""

    def __init__(self, engine: Engine) -> None:
        self.now, self.sizes = 0.0, list[int]()
        self._dispatch = engine.dispatcher.dispatch
        engine.dispatcher.dispatch = self._take_time  # type: ignore[method-assign]

    def monotonic(self) -> float:
        return self.now

    def _take_time(self, layer: int, x_TD: torch.Tensor, *rest: torch.Tensor) -> Any:
        if layer == 0:
            self.now += 0.0025 * len(x_TD)
            self.sizes.append(len(x_TD))
        return self._dispatch(layer, x_TD, *rest)


def test_without_a_setting_steps_beside_answers_take_as_long_as_the_target(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 tokens are 0.25 s here. While nobody is being answered, a step may take longer."""
    engine = make_engine(model_dir, budget=None, num_blocks=600, prefix_caching=False)
    clock = Clock(engine)
    monkeypatch.setattr("actors.engine.engine.time", clock)
    engine.add(GenerationRequest("0", "test", (1,) * 230, SamplingParams(max_tokens=20)))
    engine.step()
    for i in range(1, 5):
        engine.add(GenerationRequest(str(i), "test", (i,) * 230, SamplingParams(max_tokens=20)))
    while engine.has_work:
        engine.step()
    assert clock.sizes[0] == 230
    assert max(clock.sizes[1:]) == 100


def metric(engine: Engine, name: str) -> float:
    return sum(value for key, _, value in engine.metrics.samples() if key == f"outcrop_{name}")


def test_queue_time_is_known_when_a_sequence_starts_and_only_once(model_dir: Path) -> None:
    engine = make_engine(model_dir, max_num_seqs=1, num_blocks=24, budget=9)
    for i in range(2):
        engine.add(GenerationRequest(str(i), "test", tuple(PROMPTS[i]), GREEDY))
    engine.step()
    assert metric(engine, "request_queue_time_seconds_count") == 1
    while engine.has_work:
        engine.step()
    assert metric(engine, "request_queue_time_seconds_count") == 2


@pytest.mark.parametrize(("replayed", "attempt"), [((7, 8), 1), ((), 1)])
def test_a_replay_counts_no_prompt_tokens(model_dir: Path, replayed: tuple[int, ...], attempt: int) -> None:
    engine = make_engine(model_dir)
    engine.add(GenerationRequest("a", "test", (1, 2, 3), GREEDY))
    engine.add(GenerationRequest("b", "test", (4, 5), GREEDY, replayed, attempt=attempt))
    assert metric(engine, "prompt_tokens_total") == 3


def test_stop_tokens_end_a_sequence_and_min_tokens_delays_them(model_dir: Path, expected: list[list[int]]) -> None:
    stop = expected[1][5]
    first = expected[1].index(stop)
    params = SamplingParams(max_tokens=24, temperature=0.0, stop_token_ids=(stop,))
    result = run(make_engine(model_dir), {"a": (PROMPTS[1], params)})["a"]
    assert result.token_ids == expected[1][: first + 1]
    assert result.last.finish_reason == "stop"
    params = SamplingParams(max_tokens=24, temperature=0.0, stop_token_ids=(stop,), min_tokens=24)
    result = run(make_engine(model_dir), {"a": (PROMPTS[1], params)})["a"]
    assert stop not in result.token_ids
    assert result.last.finish_reason == "length"
