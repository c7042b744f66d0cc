"""What the config.json of published models say, read without their weights. Numbers of parameters are those that the
models' own pages tell.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.errors import ModelError
from cluster.models.family import all_families, parse_config
from cluster.models.sizes import Sizes
from cluster.models.spec import LayerSpec, RouterRule
from deploy.cli import check
from deploy.cli.main import app
from tests.families import FAMILIES

PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "published_configs.json").read_text(encoding="utf-8")
)
# Billions of parameters; KiB of keys and values per token, in bfloat16; experts' share of the weights.
FACTS = {
    "Qwen/Qwen3-30B-A3B": (30.5, 96, 0.95),
    "Qwen/Qwen3-235B-A22B": (235.1, 188, 0.966),
    "mistralai/Mixtral-8x7B-v0.1": (46.7, 128, 0.966),
    "mistralai/Mixtral-8x22B-v0.1": (140.6, 224, 0.963),
    "allenai/OLMoE-1B-7B-0924": (6.92, 128, 0.93),
    "Qwen/Qwen1.5-MoE-A2.7B": (14.3, 192, 0.87),
    "ibm-granite/granite-swash-3b-a600m": (3.02, 28, 0.875),
}


@pytest.mark.parametrize("name", FACTS)
def test_sizes_follow_from_the_config_alone(name: str) -> None:
    spec = parse_config(PUBLISHED[name])
    sizes = Sizes.of(spec, "bfloat16")
    billions, kv_kib, share = FACTS[name]
    assert (sizes.front + sizes.experts) / 2e9 == pytest.approx(billions, rel=0.005)
    assert sizes.kv_per_token / 2**10 == pytest.approx(kv_kib, rel=0.01)
    assert sizes.experts / (sizes.front + sizes.experts) == pytest.approx(share, abs=0.01)
    assert spec.dtype == "bfloat16"


def test_what_sets_the_families_apart() -> None:
    specs = {name.rpartition("/")[2]: parse_config(raw) for name, raw in PUBLISHED.items()}
    qwen3, swash = specs["Qwen3-30B-A3B"], specs["granite-swash-3b-a600m"]
    assert qwen3.num_heads * qwen3.head_dim == 2 * qwen3.hidden_size
    assert (qwen3.qk_norm, qwen3.router, qwen3.attention_scale) == ("head", RouterRule("all", True), 128**-0.5)
    assert swash.layers[:4] == (LayerSpec(), LayerSpec(window=128), LayerSpec(window=128), LayerSpec())
    assert swash.has_sinks
    assert (swash.shared_size, swash.shared_is_gated) == (1280, False)
    olmoe, qwen2 = specs["OLMoE-1B-7B-0924"], specs["Qwen1.5-MoE-A2.7B"]
    assert (olmoe.qk_norm, olmoe.router) == ("projection", RouterRule("all", False))
    assert (qwen2.biases, qwen2.shared_size, qwen2.shared_is_gated) == (frozenset("qkv"), 5632, True)
    assert {layer.window for layer in qwen2.layers} == {None}, "use_sliding_window is not set"
    assert specs["Mixtral-8x7B-v0.1"].rope.rope_theta == 1e6


def test_a_dry_run_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "kernels_here", lambda config, path: f"kernels for {path.name}")
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen/Qwen3-235B-A22B"]))
    for model in (tmp_path, tmp_path / "config.json"):
        result = CliRunner().invoke(app, ["check", "--dry-run", str(model), "--groups", "8"], env={"COLUMNS": "200"})
        text = " ".join(result.output.split())
        assert result.exit_code == 0, text
        assert "weights: 437.90 GiB in bfloat16: 14.90 GiB in each front, 423.00 GiB of experts" in text
        assert "experts: 128 x 94 layers over 8 groups x 1 replicas, 16 per group, 52.9 GiB per replica" in text
        assert "KV cache: 188.7 KiB for each token, 7.37 GiB for 40,960 of them" in text
        assert f"kernels for {model.name}" in text
    result = CliRunner().invoke(app, ["check", "--dry-run", str(tmp_path), "--groups", "7"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "groups=7" in result.output


BY_TYPE = {raw["model_type"]: raw for raw in PUBLISHED.values()}


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen3_moe", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is set"),
        ("qwen3_moe", {"rope_scaling": {"rope_type": "mrope", "factor": 2}}, "rope_type='mrope'"),
        ("qwen3_moe", {"num_key_value_heads": None}, "num_key_value_heads"),
        ("qwen3_moe", {"mlp_only_layers": list(range(94))}, "no layer has experts"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 7}, "max_window_layers=7"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window wants a sliding_window"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 5}, "shared_expert_intermediate_size=5 is not known"),
        ("qwen3_moe", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not known of 'qwen3_moe'"),
        ("qwen3_moe", {"num_experts_per_tok": 129}, "num_experts_per_tok=129 is more than num_experts=128"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 24}, "use_sliding_window is not set"),
        ("qwen2_moe", {"layer_types": ["full_attention"]}, "layer_types tells of 1 layers"),
        ("mixtral", {"sliding_window": 0}, "sliding_window=0"),
        ("mixtral", {"attention_bias": True}, "attention_bias=True is not known of 'mixtral'"),
        ("olmoe", {"head_dim": 64}, "head_dim=64 is not served: it must be hidden_size / num_attention_heads"),
        ("olmoe", {"clip_qkv": -1}, "clip_qkv=-1"),
        ("olmoe", {"sliding_window": 100}, "sliding_window=100 is not known"),
        ("granitemoe_swa", {"layer_rope_theta": [0.5] * 28}, "layer_rope_theta=.*each must be 0 or more than 1"),
        ("granitemoe_swa", {"layer_types": ["chunked_attention"] * 28}, "layer_types.0='chunked_attention'"),
        ("granitemoe_swa", {"sliding_window": None}, "sliding_window=None"),
        ("granitemoe_swa", {"sink_form": "softmax"}, "sink_form='softmax' is not known"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_config(BY_TYPE[model_type] | changes)


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_keys_that_are_not_set_are_not_missed(model_type: str) -> None:
    raw = BY_TYPE[model_type]
    assert parse_config(raw | {"something_new": None, "another": False, "_name": "x"}) == parse_config(raw)


def test_defaults_are_those_of_transformers() -> None:
    from transformers import AutoConfig

    for model_type, models in FAMILIES.items():
        base = next(iter(models.values())).config
        needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        raw = {name: base[name] for name in needed} | {"intermediate_size": 16, "num_experts_per_tok": 2}
        theirs = AutoConfig.for_model(model_type, **raw).to_dict()
        generic = {name for name in theirs if name not in parser_fields(model_type)}
        assert parse_config(raw | {"model_type": model_type}) == parse_config(
            {name: value for name, value in theirs.items() if name not in generic} | {"model_type": model_type}
        )


def parser_fields(model_type: str) -> set[str]:
    """The keys of config.json that the family's module knows, and those that are spelled otherwise there."""
    import sys

    module = sys.modules[all_families()[model_type].parse.__module__]
    return set(module.Config.model_fields) | {"eos_token_id", "rope_theta", "rope_scaling"}


def test_nothing_else_knows_a_family() -> None:
    root = Path(__file__).parents[2]
    names = {word.lower() for f in all_families().values() for word in (f.model_type, f.architecture)}
    files = [path for folder in ("actors", "cluster", "benchmarks", "deploy") for path in (root / folder).rglob("*")]
    sources = [path for path in files if path.suffix in {".py", ".cpp", ".h"} and "demo" not in path.parts]
    assert len(sources) > 150
    found = {
        f"{path.relative_to(root)}: {name}"
        for path in sources
        if "families" not in path.parts
        for name in names
        if name in path.read_text(encoding="utf-8").lower()
    }
    assert not found
