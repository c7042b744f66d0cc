"""What config.json may say: read as transformers reads it, or refused with the field, the value and the way out."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GraniteMoeConfig as TransformersConfig

from cluster.errors import ModelError
from cluster.models.families.granite_moe import Config
from cluster.models.family import read_spec
from cluster.models.spec import ModelSpec
from tests.checkpoints import GRANITEMOE, LLAMA3, LONGROPE, YARN


def read(tmp_path: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    raw = GRANITEMOE | {"model_type": "granitemoe"} | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return read_spec(tmp_path)


def test_published_spelling(tmp_path: Path):
    config = read(tmp_path, rope_theta=1.5e6, rope_scaling=None, torch_dtype="bfloat16", num_key_value_heads=None)
    assert config.rope.rope_theta == 1.5e6
    assert config.rope.rope_type == "default"
    assert config.dtype == "bfloat16"
    assert config.num_kv_heads == config.num_heads == 4
    assert config.head_dim == 8


def test_defaults_are_those_of_transformers():
    ours, theirs = Config.model_validate(GRANITEMOE), TransformersConfig(**GRANITEMOE)
    same = [name for name in Config.model_fields if hasattr(theirs, name)]
    same = [name for name in same if name not in ("rope_parameters", "dtype")]
    assert len(same) > 15
    assert {name: getattr(ours, name) for name in same} == {name: getattr(theirs, name) for name in same}
    assert ours.rope_parameters.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": YARN, "original_max_position_embeddings": 99},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": LONGROPE},
    ],
)
def test_rope_is_found_where_transformers_finds_it(rope: dict[str, Any]):
    config = Config.model_validate(GRANITEMOE | rope)
    reference = TransformersConfig(**GRANITEMOE | copy.deepcopy(rope))  # it changes the dictionaries that it is given
    reference.standardize_rope_params()  # as the model does before it computes frequencies
    theirs = {name: value for name, value in reference.rope_parameters.items() if name != "type"}
    ours = config.rope_parameters.model_dump(exclude_unset=True) | {"rope_theta": config.rope_parameters.rope_theta}
    if "original_max_position_embeddings" in theirs:
        ours["original_max_position_embeddings"] = (
            config.rope_parameters.original_max_position_embeddings or config.max_position_embeddings
        )
    assert {name: list(value) if isinstance(value, tuple) else value for name, value in ours.items()} == theirs


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (7, None, (7,)),
        (None, None, ()),
        ([3, 4], None, (3, 4)),
        (7, {"eos_token_id": [0, 9]}, (0, 9)),
        (7, {}, (7,)),
    ],
)
def test_end_of_sequence_ids(tmp_path: Path, eos, generation, expected):
    assert read(tmp_path, generation, eos_token_id=eos).eos_token_ids == expected


def test_max_context_ends_where_the_reference_changes_its_frequencies(tmp_path: Path):
    assert read(tmp_path).max_context == 256
    assert read(tmp_path, rope_parameters=YARN).max_context == 256
    assert read(tmp_path, rope_parameters=LONGROPE).max_context == 128
    assert read(tmp_path, rope_parameters={"rope_type": "dynamic", "factor": 2.0}).max_context == 256


def test_training_parameters_are_accepted(tmp_path: Path):
    read(tmp_path, initializer_range=0.5, attention_dropout=0.3, router_aux_loss_coef=0.1, output_router_logits=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_oss"}, "model_type='gpt_oss' is not served.*granitemoe"),
        ({"expert_capacity": 3}, "expert_capacity=3 is not known of 'granitemoe': it must not be set"),
        ({"hidden_act": "mish"}, "hidden_act='mish'.*silu"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_local_experts=8"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"hidden_size": None}, "hidden_size.*required"),
        ({"logits_scaling": 0}, "logits_scaling=0"),
        ({"dtype": "float64"}, "dtype='float64'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*not served"),
        ({"rope_scaling": 5}, "rope_scaling or rope_parameters is 5"),
        ({"rope_parameters": ["yarn"]}, "must be an object"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"embedding_multiplier": float("inf")}, "embedding_multiplier=inf"),
        ({"vocab_size": "x" * 10_000}, "vocab_size='x{100,200}: "),
        ({"model_type": "y" * 10_000}, "model_type='y{50,100} is not served"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type='proportional'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing: rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": YARN | {"mrope_section": [1, 1]}}, "mrope_section"),
        ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": LONGROPE | {"short_factor": [1.0]}}, "short_factor has 1 numbers: head_dim=8 needs 4"),
    ],
)
def test_refusals_name_field_and_value(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        read(tmp_path, **changes)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json can't be read"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json is not a JSON object"):
        read_spec(tmp_path)
