"""Rotary position embedding as config.json describes it, in the spelling that families share. Knows no torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# What each rope type needs beside rope_theta; original_max_position_embeddings has a default in every type.
NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


class Rope(BaseModel):
    """As in transformers' `rope_parameters`; factors that are unset take transformers' defaults.

    partial_rotary_factor is accepted at 1 only: whole heads are rotated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rope_type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = "default"
    rope_theta: float = Field(10000.0, gt=1)
    partial_rotary_factor: float = Field(1.0, ge=1, le=1)
    factor: float | None = Field(None, gt=0)
    original_max_position_embeddings: int | None = Field(None, gt=0)
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = Field(None, gt=0)
    high_freq_factor: float | None = Field(None, gt=0)
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "Rope":
        for name in NEEDS[self.rope_type]:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing: rope_type={self.rope_type!r} needs it")
        return self

    def check_head(self, head_dim: int) -> None:
        """Raises ValueError if heads of this size can't be rotated so."""
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is odd: rotary embedding needs an even number")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != head_dim // 2:
                raise ValueError(
                    f"rope_parameters.{name} has {len(factors)} numbers: head_dim={head_dim} needs {head_dim // 2}"
                )

    def max_context(self, max_positions: int) -> int:
        """Longest sequence that is computed as the reference model computes it.

        With `dynamic` and `longrope` the reference picks frequencies by the length of the whole sequence, so a
        sequence that outgrows the first regime would need every cached key rotated anew. Inside that regime the
        frequencies are constant, and a server can batch sequences of any length: so that is where we stop.
        """
        if self.rope_type == "longrope":
            return min(self.original_max_position_embeddings or max_positions, max_positions)
        return max_positions


def rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (transformers 5) or the older `rope_theta` + `rope_scaling` ({"type"|"rope_type", ...}) of a
    config.json.

    Precedence as in transformers: rope_scaling replaces rope_parameters; what the chosen table lacks comes from the
    top level, except that a top-level original_max_position_embeddings wins.
    """
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise ValueError(f"rope_scaling or rope_parameters is {found!r:.100}: it must be an object")
    rope = dict(found)
    older_type = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or older_type or "default"
    for name in ("rope_theta", "partial_rotary_factor"):
        if rope.get(name) is None:
            rope[name] = raw.get(name)
    if raw.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    return {key: value for key, value in rope.items() if value is not None}
