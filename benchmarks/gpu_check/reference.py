"""Against transformers on the same device: greedy tokens in float32, rounding errors in bfloat16."""

from pathlib import Path
from typing import Any

import torch

from actors.compute import Compute
from benchmarks.gpu_check.check import Check, NotRunError, Trial
from benchmarks.gpu_check.models import ALL_EXPERTS, SMALL, generate, local, make_engine, prompts, tokens_of
from cluster.messages.requests import SamplingParams

LAYERS, NUM_TOKENS = 4, 24
# Of our mean error over that of transformers, both against float32.
MOST_ERROR_RATIO = 1.5


def load_reference(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model in its plainest form: eager attention, one expert after the other."""
    try:
        from transformers import AutoModelForCausalLM, logging
    except ImportError:
        raise NotRunError("transformers is not installed: pip install 'transformers>=5.0'") from None
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    model.generation_config.eos_token_id = None
    return model.eval().to(device)


def float32(trial: Trial) -> None:
    checkpoint, compute = trial.checkpoint(SMALL, LAYERS), Compute.choose(trial.device.type, "float32")
    reference = load_reference(checkpoint.directory, torch.float32, trial.device)
    asked = prompts(3, 40)
    engine = make_engine(checkpoint, compute, local(checkpoint, compute))
    ours = tokens_of(generate(engine, asked, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)))
    for number, prompt in enumerate(asked):
        ids = torch.tensor([prompt], device=trial.device)
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False)
        trial.expect(out[0, len(prompt) :].tolist() == ours[number], f"prompt {number}: other tokens")
    trial.figures["tokens"] = sum(map(len, ours))
    trial.figures["different ones"] = len({token for each in ours for token in each})


def bfloat16(trial: Trial) -> None:
    """Every expert is chosen: rounding can't flip the router's choice, which would make any comparison loose."""
    checkpoint, compute = trial.checkpoint(ALL_EXPERTS, LAYERS), Compute.choose(trial.device.type, "bfloat16")
    (prompt,) = prompts(1, 400)
    exact, rounded = (
        _scores(load_reference(checkpoint.directory, dtype, trial.device), prompt, trial.device)
        for dtype in (torch.float32, torch.bfloat16)
    )
    engine = make_engine(checkpoint, compute, local(checkpoint, compute))
    ((output, *_),) = generate(engine, [prompt], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    ours = torch.tensor([score.logprob for score in output.prompt_logprobs or () if score])
    errors = [float((each - exact).abs().mean()) for each in (ours, rounded)]
    trial.figures |= {"our error": f"{errors[0]:.2e}", "of transformers": f"{errors[1]:.2e}"}
    ratio = errors[0] / errors[1]
    trial.expect(ratio <= MOST_ERROR_RATIO, f"our error is {ratio:.2f} times that of transformers")


def _scores(reference: Any, prompt: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Log-probability of each token but the first."""
    logits: torch.Tensor = reference(torch.tensor([prompt], device=device)).logits[0].float().cpu()
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


CHECKS = (
    Check("float32 model", "greedy tokens are those of transformers", float32),
    Check("bfloat16 model", "rounding errors are no larger than those of transformers", bfloat16),
)
