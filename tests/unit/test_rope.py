"""Rotary frequencies against transformers' ROPE_INIT_FUNCTIONS."""

import pytest
import torch
from transformers import GraniteMoeConfig as TransformersConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeRotaryEmbedding, apply_rotary_pos_emb

from actors.model.rope import FREQUENCIES, Rotary, apply_rotary
from cluster.models.spec import ModelSpec
from tests.checkpoints import GRANITEMOE, LLAMA3, LONGROPE, YARN
from tests.specs import spec_of

SHAPE = GRANITEMOE | {"hidden_size": 32, "num_attention_heads": 4}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1.5e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
    "yarn": YARN,
    "yarn, attention_factor": YARN | {"attention_factor": 1.7, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn, mscale": YARN | {"mscale": 1.3, "mscale_all_dim": 0.4},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, factor 1": YARN | {"factor": 1.0},
    "yarn, one-step ramp": YARN | {"original_max_position_embeddings": 2},
    "yarn, context from the model": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
    "longrope": LONGROPE,
    "longrope, factor": LONGROPE | {"factor": 5.0},
    "longrope, attention_factor": LONGROPE | {"attention_factor": 0.8},
    "llama3": LLAMA3,
    "llama3, other bands": LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 9.0, "rope_theta": 1e4},
}


def both_configs(rope: dict) -> tuple[ModelSpec, TransformersConfig]:
    return spec_of(SHAPE | {"rope_parameters": rope}), TransformersConfig(**SHAPE | {"rope_parameters": dict(rope)})


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers(name: str):
    ours, theirs = both_configs(ROPES[name])
    rope_type = ours.rope.rope_type
    reference = ROPE_INIT_FUNCTIONS.get(rope_type, GraniteMoeRotaryEmbedding.compute_default_rope_parameters)
    expected, expected_factor = reference(theirs)
    frequencies, factor = FREQUENCIES[rope_type](ours)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_up_to_max_context_the_reference_does_not_change_its_frequencies(name: str):
    ours, theirs = both_configs(ROPES[name])
    reference = GraniteMoeRotaryEmbedding(theirs)
    frequencies, _ = FREQUENCIES[name](ours)
    reference(torch.zeros(1), torch.arange(ours.max_context)[None])
    torch.testing.assert_close(reference.inv_freq, frequencies, rtol=1e-6, atol=0)
    reference(torch.zeros(1), torch.arange(ours.max_context + 1)[None])
    assert not torch.allclose(reference.inv_freq, frequencies), "one token more, and the reference has other angles"


def test_rotation_equals_transformers():
    ours, theirs = both_configs(YARN)
    positions_T = torch.tensor([3, 0, 250, 17, 18])
    q_TNC, k_TNC = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    cos, sin = GraniteMoeRotaryEmbedding(theirs)(q_TNC, positions_T[None])
    q_ref, k_ref = apply_rotary_pos_emb(q_TNC.transpose(0, 1)[None], k_TNC.transpose(0, 1)[None], cos, sin)
    angles = Rotary(ours, torch.device("cpu")).angles(positions_T, torch.float32)
    for x_TNC, expected in ((q_TNC, q_ref), (k_TNC, k_ref)):
        torch.testing.assert_close(apply_rotary(x_TNC, angles), expected[0].transpose(0, 1), rtol=0, atol=1e-5)
