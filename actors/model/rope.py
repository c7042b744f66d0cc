"""Rotary position embedding (NeoX style), for every rope type whose frequencies do not depend on the sequence length.

Formulas and defaults are those of transformers' modeling_rope_utils (ROPE_INIT_FUNCTIONS), which is the test oracle.
`dynamic` and `longrope` are served in their first regime only; see Rope.max_context in cluster/models/rope.py.

Shapes: T tokens, N heads (any), C head dimension.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cluster.models.spec import ModelSpec

# cos and signed sine of a step's positions (Rotary.angles), by the base of a layer; None: it encodes no positions.
Angles = dict[float | None, tuple[Tensor, Tensor] | None]
# Inverse frequencies [C/2] and the factor that multiplies cos and sin.
Frequencies = tuple[Tensor, float]


def _default(spec: ModelSpec) -> Frequencies:
    return 1.0 / _powers(spec), 1.0


def _linear(spec: ModelSpec) -> Frequencies:
    return 1.0 / _powers(spec) / _factor(spec), 1.0


def _yarn(spec: ModelSpec) -> Frequencies:
    """https://arxiv.org/abs/2309.00071: high frequencies as they are, low ones interpolated, a ramp between."""
    rope, factor = spec.rope, _factor(spec)
    low, high = _yarn_range(spec)
    steps = torch.arange(spec.head_dim // 2, dtype=torch.float32)
    keep = 1 - ((steps - low) / (high - low)).clamp(0, 1)
    powers = _powers(spec)
    inverse = 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep
    if rope.attention_factor is not None:
        return inverse, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return inverse, _yarn_mscale(factor, rope.mscale) / _yarn_mscale(factor, rope.mscale_all_dim)
    return inverse, _yarn_mscale(factor, 1.0)


def _yarn_range(spec: ModelSpec) -> tuple[float, float]:
    rope, dim = spec.rope, spec.head_dim

    def dimension_of(rotations: float) -> float:
        turns = spec.rope_original_context / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.rope_theta))

    low, high = dimension_of(rope.beta_fast or 32), dimension_of(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def _yarn_mscale(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def _longrope(spec: ModelSpec) -> Frequencies:
    """https://arxiv.org/abs/2402.13753, the short factors: sequences are kept within the original context."""
    rope, factor = spec.rope, _factor(spec)
    inverse = 1.0 / (torch.tensor(rope.short_factor, dtype=torch.float32) * _powers(spec))
    if rope.attention_factor is not None:
        return inverse, rope.attention_factor
    if factor <= 1:
        return inverse, 1.0
    return inverse, math.sqrt(1 + math.log(factor) / math.log(spec.rope_original_context))


def _llama3(spec: ModelSpec) -> Frequencies:
    rope, context = spec.rope, spec.rope_original_context
    assert rope.low_freq_factor is not None
    assert rope.high_freq_factor is not None
    low, high, factor = rope.low_freq_factor, rope.high_freq_factor, _factor(spec)
    inverse = 1.0 / _powers(spec)
    wavelength = 2 * math.pi / inverse
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * inverse / factor + smooth * inverse
    scaled = torch.where(wavelength > context / low, inverse / factor, between)
    return torch.where(wavelength < context / high, inverse, scaled), 1.0


def _powers(spec: ModelSpec) -> Tensor:
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    powers: Tensor = spec.rope.rope_theta**exponents
    return powers


def _factor(spec: ModelSpec) -> float:
    factor = spec.rope.factor
    return spec.max_positions / spec.rope_original_context if factor is None else factor


FREQUENCIES: dict[str, Callable[[ModelSpec], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}


class Rotary:
    """Angles of a step's positions, computed once and used by every layer of the same base."""

    def __init__(self, spec: ModelSpec, device: torch.device, base: float | None = None) -> None:
        if base is not None:
            spec = replace(spec, rope=spec.rope.model_copy(update={"rope_theta": base}))
        inverse, self.scale = FREQUENCIES[spec.rope.rope_type](spec)
        self.inverse = inverse.to(device)

    def angles(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin, [T, 1, C]. The sign of rotate-half (-x2, x1) is folded into the sine."""
        angle = positions_T[:, None].float() * self.inverse
        cos, sin = angle.cos() * self.scale, angle.sin() * self.scale
        return torch.cat((cos, cos), -1).to(dtype)[:, None], torch.cat((-sin, sin), -1).to(dtype)[:, None]


def rotaries(spec: ModelSpec, device: torch.device) -> dict[float, Rotary]:
    """One for each base that a layer has."""
    return {base: Rotary(spec, device, base) for layer in spec.layers if (base := layer.rope_theta) is not None}


def apply_rotary(x_TNC: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x * cos + rotate_half(x) * sin."""
    cos, signed_sin = angles
    return torch.addcmul(x_TNC * cos, x_TNC.roll(x_TNC.shape[-1] // 2, dims=-1), signed_sin)
