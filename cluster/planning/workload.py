"""What is served: the model, what clients send, and what they are promised."""

import math
from dataclasses import dataclass

from cluster.errors import ConfigError
from cluster.models.sizes import ITEM_BYTES, Sizes
from cluster.models.spec import ModelSpec
from cluster.planning.expert_use import ExpertUse


def check_positive(**values: float | None) -> None:
    """Raises ConfigError for one that is not a number above 0; None is absent."""
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name}={value:g}: choose more than 0")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """`sizes` are bytes of weights and of a token's keys and values, in the type that is served."""

    spec: ModelSpec
    dtype: str
    sizes: Sizes
    experts: ExpertUse

    @classmethod
    def of(cls, spec: ModelSpec, dtype: str = "bfloat16", experts: ExpertUse | None = None) -> "ServedModel":
        """Without measured `experts`, each token chooses evenly."""
        return cls(spec, dtype, Sizes.of(spec, dtype), experts or ExpertUse.even(spec))

    @property
    def itemsize(self) -> int:
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of `input_len` prompt tokens and `output_len` new ones: `rate` of them per second, at random times, or
    `concurrency` of them at a time.
    """

    input_len: int
    output_len: int
    rate: float | None = None
    concurrency: float | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        for name in ("input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: choose 1 or more tokens")
        if (self.rate is None) == (self.concurrency is None):
            raise ConfigError(
                f"rate={self.rate} and concurrency={self.concurrency}: give one of them, requests per second or "
                "requests at a time"
            )
        check_positive(rate=self.rate, concurrency=self.concurrency)

    @property
    def length(self) -> int:
        return self.input_len + self.output_len

    @property
    def mean_context(self) -> float:
        """Tokens that a sequence has in the cache, on average over its answer."""
        return self.input_len + self.output_len / 2


@dataclass(frozen=True, slots=True)
class Goals:
    """Seconds until the first token, and between tokens, on average. `survive`: so many actors may be lost at once."""

    ttft_s: float = 2.0
    tpot_s: float = 0.1
    survive: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        check_positive(ttft=self.ttft_s, tpot=self.tpot_s)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a front computes in one step: a token for each of `decodes` sequences with `context` tokens, and
    `prompt_tokens` of prompts, after which their sequence has `prompt_context`.
    """

    decodes: float = 0
    context: float = 0
    prompt_tokens: float = 0
    prompt_context: float = 0

    @property
    def tokens(self) -> float:
        return self.decodes + self.prompt_tokens

    @property
    def sequences(self) -> float:
        """Those that are continued, and one that prompt tokens belong to."""
        return self.decodes + (1 if self.prompt_tokens else 0)
