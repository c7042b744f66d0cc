"""What is predicted for whole steps from measured parts, against whole steps that were measured on the same machine.

Parts: kernels.json (experts by tokens), attention.json. Steps: offline.json, lane local, two cores with AVX2.
"""

import json
import statistics
from typing import Any

from benchmarks.make_checkpoint import SHAPES
from benchmarks.tables import RESULTS
from cluster.models.family import parse_config
from cluster.models.spec import LayerSpec
from cluster.planning.cost import attention_cost
from cluster.planning.layout import Layout
from cluster.planning.step_time import StepModel
from cluster.planning.workload import Batch, ServedModel
from tests.unit.planning_profiles import profile

MODEL = ServedModel.of(parse_config(SHAPES["1b-a400m"]))
# Contexts as the command in offline.json has them: 32, and half of 8 steps.
BATCHES = {
    "decode 1": Batch(1, 36),
    "decode 8": Batch(8, 36),
    "decode 32": Batch(32, 36),
    "prefill 512": Batch(prompt_tokens=512, prompt_context=512),
}


def result(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{name}.json").read_text())["figures"]  # type: ignore[no-any-return]


def machine() -> Any:
    """The front's matrices go at the speed of experts: the same kernels. Books as `outcrop probe` finds them."""
    native = [each for each in result("kernels") if each["kernels"] == "native"]
    rows = [each["tokens"] * MODEL.spec.top_k / MODEL.experts.touched(each["tokens"]) for each in native]
    speeds = [{"rows": r, "gb_per_second": each["gb_per_second"]} for r, each in zip(rows, native, strict=True)]
    seconds = {(each["case"], each["context"]): each["native_ms"] / 1e3 for each in result("attention")}
    decodes = 32 * attention_cost(MODEL.spec, LayerSpec(), 1, 1024, 2).num_bytes
    prompt = attention_cost(MODEL.spec, LayerSpec(), 512, 512, 2).flops
    attention = {
        "gb_per_second": decodes / seconds["32 sequences", 1024] / 1e9,
        "tflops": prompt / seconds["512 tokens of a prompt", 512] / 1e12,
    }
    overheads = {"step_us": 340.0, "sequence_us": 70.0, "layer_us": 85.0, "dispatch_us": 0.0}
    return profile("avx2", cores=2, linears=speeds, experts=speeds, attention=attention, overheads=overheads)


def test_steps_are_predicted_from_parts() -> None:
    """Within what a plan aims at: a median error of 10 %, 25 % at worst."""
    node = machine()
    steps = StepModel(MODEL, Layout(1, 1, 1, "local", node, node, is_shared=True))
    measured = {each["case"]: each["seconds"] for each in result("offline") if each["lane"] == "local"}
    errors = {case: steps.step(batch).total / measured[case] - 1 for case, batch in BATCHES.items()}
    print({case: f"{100 * error:+.0f} %" for case, error in errors.items()})
    assert statistics.median(map(abs, errors.values())) <= 0.10, errors
    assert max(map(abs, errors.values())) <= 0.25, errors
