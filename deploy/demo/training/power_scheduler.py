"""The Power scheduler of Shen et al., "Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate
Scheduler" (arXiv 2408.13359), which trained PowerMoE, as a pure function of the tokens seen so far.

    eta_power(n) = min(lr_max, beta * a * n^b)                                                     (eq. 7)

    Power(n) = n / N_warmup * eta_power(N_warmup)                  while n < N_warmup              (eq. 8)
               eta_power(n)                                        until N - N_decay
               f(n, N, N_decay) * eta_power(N - N_decay)           in the final decay

n counts tokens. beta is the batch size in sequences; the paper fitted a and b with sequences of 4096 tokens,
so a run with another length keeps them by counting its batch in units of 4096 tokens (`batch_in_sequences`).
The paper leaves f open and decays exponentially to 0; this one is linear, which needs no floor.
"""

from dataclasses import dataclass

SEQUENCE_TOKENS = 4096


def batch_in_sequences(tokens: float) -> float:
    """The paper's beta for a batch of this many tokens; it may be a fraction."""
    return tokens / SEQUENCE_TOKENS


@dataclass(frozen=True)
class PowerSchedule:
    """The constants of a run. `batch_size` is beta, in sequences of 4096 tokens; the rest is in tokens.

    `total_tokens` may be None: the schedule then has no final decay and the run no planned end."""

    batch_size: float
    lr_max: float = 0.02
    warmup_tokens: int = 0
    total_tokens: int | None = None
    decay_tokens: int = 0
    a: float = 4.0
    b: float = -0.51

    def __post_init__(self) -> None:
        if self.batch_size <= 0 or self.lr_max <= 0 or self.a <= 0:
            raise ValueError(f"batch_size, lr_max and a must be positive: {self}")
        if self.warmup_tokens < 0 or self.decay_tokens < 0:
            raise ValueError(f"warmup_tokens and decay_tokens must not be negative: {self}")
        if self.total_tokens is not None and self.warmup_tokens + self.decay_tokens > self.total_tokens:
            raise ValueError(f"warmup_tokens + decay_tokens exceed total_tokens={self.total_tokens}: {self}")


def power_lr(schedule: PowerSchedule, tokens: float) -> float:
    """The learning rate after `tokens` trained tokens; 0 from `total_tokens` on if there is a decay."""
    if tokens < schedule.warmup_tokens:
        return tokens / schedule.warmup_tokens * _eta_power(schedule, schedule.warmup_tokens)
    if schedule.total_tokens is None or schedule.decay_tokens == 0:
        return _eta_power(schedule, tokens)
    decay_start = schedule.total_tokens - schedule.decay_tokens
    if tokens <= decay_start:
        return _eta_power(schedule, tokens)
    left = max(0.0, schedule.total_tokens - tokens)
    return left / schedule.decay_tokens * _eta_power(schedule, decay_start)


def _eta_power(schedule: PowerSchedule, tokens: float) -> float:
    if tokens <= 0:
        return schedule.lr_max
    return float(min(schedule.lr_max, schedule.batch_size * schedule.a * tokens**schedule.b))
