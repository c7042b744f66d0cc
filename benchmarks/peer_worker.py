"""One engine in a process of its own: reads a case per line from stdin, answers with seconds.

Runs in the peers' virtual environments as well, so it imports nothing of this project but for the engines of `outcrop`.

    python benchmarks/peer_worker.py outcrop|outcrop-local|vllm|transformers CHECKPOINT DTYPE
    <- {"prompts": [[1, 2], [3, 4]], "tokens": 9}    -> {"seconds": 0.5}
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Greedily continues every prompt by exactly so many tokens.
Generate = Callable[[list[list[int]], int], Any]


def outcrop(checkpoint: str, dtype: str, stack: ExitStack) -> Generate:
    """A front in this process and two groups of experts over the unix lane, as `outcrop serve` has them."""
    return _outcrop(checkpoint, dtype, stack, groups=2)


def outcrop_local(checkpoint: str, dtype: str, stack: ExitStack) -> Generate:
    """All experts in the front."""
    return _outcrop(checkpoint, dtype, stack, groups=0)


def _outcrop(checkpoint: str, dtype: str, stack: ExitStack, groups: int) -> Generate:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from benchmarks.lanes import expert_cluster, local_dispatcher, make_engine
    from cluster.messages.requests import GenerationRequest, SamplingParams
    from cluster.models.checkpoint import Checkpoint

    path = Path(checkpoint)
    cluster = stack.enter_context(expert_cluster(path, groups, 1, dtype)) if groups else None
    from actors.process.limits import limit_threads

    limit_threads(os.cpu_count() or 1)
    from actors.compute import Compute

    opened, compute = Checkpoint.open(path), Compute.choose("cpu", dtype)
    engine = make_engine(opened, compute, 16 * 1024, 2048)
    if cluster:
        engine.dispatcher = cluster.dispatcher("unix", engine.metrics)
        stack.callback(engine.dispatcher.lane.close)
    else:
        engine.dispatcher = local_dispatcher(opened, compute)

    def generate(prompts: list[list[int]], tokens: int) -> None:
        for number, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=tokens, temperature=0.0)
            engine.add(GenerationRequest(str(number), "", tuple(prompt), params))
        while engine.has_work:
            engine.step()

    return generate


def vllm(checkpoint: str, dtype: str, stack: ExitStack) -> Generate:
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    llm = LLM(checkpoint, dtype=dtype, max_model_len=2048, skip_tokenizer_init=True, enable_prefix_caching=False)

    def generate(prompts: list[list[int]], tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    return generate


def transformers(checkpoint: str, dtype: str, stack: ExitStack) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()

    def generate(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )

    return generate


def main(engine: str, checkpoint: str, dtype: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines like to print; the answers have the real standard output for themselves
    with ExitStack() as stack:
        start = {"outcrop": outcrop, "outcrop-local": outcrop_local, "vllm": vllm, "transformers": transformers}[engine]
        generate = start(checkpoint, dtype, stack)
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            case = json.loads(line)
            started = time.perf_counter()
            generate(case["prompts"], case["tokens"])
            print(json.dumps({"seconds": time.perf_counter() - started}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
