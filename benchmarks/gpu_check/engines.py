"""Whole engines: the same tokens by every way to the experts, with prefix hits, after preemption, without replicas."""

from collections.abc import Callable

from actors.compute import Compute
from actors.dispatch.dispatcher import Dispatcher
from actors.front.builder import why_no_graphs
from benchmarks.gpu_check.check import Check, Trial
from benchmarks.gpu_check.models import SMALL, generate, local, make_engine, prompts, remote, tokens_of
from cluster.messages.requests import SamplingParams

LAYERS = 4
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
DRAWN = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=5)


def float32(trial: Trial) -> None:
    """In float32 all ways have the same tokens: sums in another order differ by far less than logits do."""
    checkpoint, here = trial.checkpoint(SMALL, LAYERS), Compute.choose(trial.device.type, "float32")
    on_cpu, asked = Compute.choose("cpu", "float32"), prompts(5, 60)
    ways: dict[str, Callable[[], Dispatcher]] = {
        "local": lambda: local(checkpoint, here),
        "one replica": lambda: remote(checkpoint, here, here, 1)[0],
        "two replicas": lambda: remote(checkpoint, here, here, 2)[0],
        "replicas on the CPU": lambda: remote(checkpoint, here, on_cpu, 2)[0],
    }
    on_the_cpu = make_engine(checkpoint, on_cpu, local(checkpoint, on_cpu))
    # What is drawn may fall between two tokens, where the last bits of a sum decide: compared on one device only.
    expected = {GREEDY: tokens_of(generate(on_the_cpu, asked, GREEDY))}
    for way, make in ways.items():
        engine = make_engine(checkpoint, here, make())
        engine.warm_up()
        for name, params in (("greedy", GREEDY), ("drawn", DRAWN)):
            found = tokens_of(generate(engine, asked, params))
            trial.expect(found == expected.setdefault(params, found), f"{way}: other tokens, {name}")
    trial.figures["ways"] = ", ".join(ways)
    trial.figures["tokens"] = sum(len(each) for tokens in expected.values() for each in tokens)


def cache(trial: Trial) -> None:
    checkpoint, compute = trial.checkpoint(SMALL, LAYERS), Compute.choose(trial.device.type, "float32")
    dispatcher, asked = local(checkpoint, compute), prompts(5, 60)
    expected = tokens_of(generate(make_engine(checkpoint, compute, dispatcher), asked, GREEDY))

    engine = make_engine(checkpoint, compute, dispatcher, prefix_caching=True)
    for name in ("first", "second"):
        trial.expect(
            tokens_of(generate(engine, asked, GREEDY, name)) == expected, f"prefix cache, {name}: other tokens"
        )
    trial.figures["prefix hits"] = engine.scheduler.num_prefix_hits
    trial.expect(engine.scheduler.num_prefix_hits > 0, "nothing was found in the prefix cache")

    # Room for all prompts, but not for all that is generated.
    engine = make_engine(checkpoint, compute, dispatcher, num_tokens=416)
    trial.expect(tokens_of(generate(engine, asked, GREEDY)) == expected, "after preemption: other tokens")
    trial.figures["preemptions"] = engine.scheduler.num_preemptions
    trial.expect(engine.scheduler.num_preemptions > 0, "nobody was preempted")


def fallback(trial: Trial) -> None:
    checkpoint, compute = trial.checkpoint(SMALL, LAYERS), Compute.choose(trial.device.type, "float32")
    dispatcher, lane = remote(checkpoint, compute, compute, 2)
    engine, asked = make_engine(checkpoint, compute, dispatcher), prompts(2, 40)
    expected = tokens_of(generate(engine, asked, GREEDY))
    lane.dead = set(lane.replicas)
    trial.expect(tokens_of(generate(engine, asked, GREEDY)) == expected, "without replicas: other tokens")
    local_tokens = sum(v for name, _, v in dispatcher.metrics.samples() if name.endswith("local_fallback_tokens_total"))
    trial.figures["tokens computed in the front"] = int(local_tokens)
    trial.expect(local_tokens > 0, "nothing was computed in the front")


def bfloat16(trial: Trial) -> None:
    """One replica gets what a store in the front would, so even bfloat16 has the same bits: on a GPU, flash attention
    and grouped products are deterministic.
    """
    checkpoint, here = trial.checkpoint(SMALL, LAYERS), Compute.choose(trial.device.type, "bfloat16")
    asked = prompts(6, 280)
    first, again = (
        tokens_of(generate(make_engine(checkpoint, here, local(checkpoint, here)), asked, GREEDY)) for _ in "12"
    )
    trial.expect(first == again, "two runs have other tokens")
    engine = make_engine(checkpoint, here, remote(checkpoint, here, here, 1)[0])
    trial.expect(tokens_of(generate(engine, asked, GREEDY)) == first, "one replica: other tokens than a local store")
    trial.figures |= {"attention": here.attention, "tokens": sum(map(len, first))}


def graphs(trial: Trial) -> None:
    """Padding changes the sizes of products, so in bfloat16 a few tokens may differ: they are counted."""
    checkpoint, here = trial.checkpoint(SMALL, LAYERS), Compute.choose(trial.device.type, "bfloat16")
    asked, dispatcher = prompts(6, 280), local(checkpoint, here)
    plain = make_engine(checkpoint, here, dispatcher)
    if reason := why_no_graphs(here, checkpoint.spec.head_dim, plain.kv.block_size):
        trial.figures["not captured"] = reason
        trial.expect(not trial.is_on_gpu, reason)
        return
    computed = tokens_of(generate(plain, asked, GREEDY))
    engine = make_engine(checkpoint, here, dispatcher, graphs=True)
    engine.warm_up()
    first, again = (tokens_of(generate(engine, asked, GREEDY, name)) for name in ("first", "again"))
    trial.expect(first == again, "two replays have other tokens")
    num_equal = sum(ours == theirs for ours, theirs in zip(first, computed, strict=True))
    num_replayed = engine.model.graphs.num_replayed if engine.model.graphs else 0
    trial.figures |= {"steps replayed": num_replayed, "prompts with equal tokens": f"{num_equal} of {len(asked)}"}
    trial.expect(num_replayed > 0, "no step was replayed")
    trial.expect(2 * num_equal >= len(asked), "most prompts have other tokens than without graphs")


CHECKS = (
    Check("engine, float32", "every way to the experts gives the tokens of an engine on the CPU", float32),
    Check("engine, bfloat16", "two runs, and a replica instead of a local store, give the same tokens", bfloat16),
    Check("cache", "prefix hits and preemption change no token", cache),
    Check("fallback", "without replicas the front computes the same tokens", fallback),
    Check("graphs", "decode steps that are replayed have the tokens of those that are computed", graphs),
)
