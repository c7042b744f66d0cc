"""Finding a checkpoint and refusing a broken one before anything starts; loading only what was asked for."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors import weights as weights_module
from actors.experts.loading import contiguous_runs, load_experts
from actors.model.loading import load_front
from actors.weights import Weights
from benchmarks import make_checkpoint as maker
from cluster.errors import ModelError
from cluster.models import checkpoint
from cluster.models.checkpoint import Checkpoint
from cluster.models.family import read_spec
from cluster.models.hub import is_commit_of, local_copy, resolve_model
from cluster.models.tensor_files import read_headers
from deploy.ingress.text.tokens import Tokenizer
from tests.checkpoints import MODELS, load_reference, write_checkpoint
from tests.families import FAMILIES
from tests.specs import PLAIN, PLAIN_BFLOAT16

CPU = torch.device("cpu")
LAYER = "model.layers.1.block_sparse_moe."


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return write_checkpoint(MODELS["granite"], tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return write_checkpoint(MODELS["bias-sharded"], tmp_path_factory.mktemp("sharded"))


@pytest.fixture
def broken(single: Path, tmp_path: Path) -> Path:
    return shutil.copytree(single, tmp_path / "broken")


@pytest.fixture
def broken_shards(sharded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sharded, tmp_path / "shards")


def check(model_dir: Path) -> Checkpoint:
    return Checkpoint.open(model_dir)


def change_tensors(model_dir: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors by name ("." is written "__"); None removes one."""
    tensors = load_file(model_dir / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, model_dir / "model.safetensors")


def change_header(model_dir: Path, change) -> None:
    file = model_dir / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize("name", ["granite", "bias-sharded", "bf16-sharded-own-names", "odd-sizes"])
def test_sizes_add_up(tmp_path: Path, name: str):
    write_checkpoint(MODELS[name], tmp_path)
    info = check(tmp_path)
    spec = info.spec
    stored = sum(tensor.num_bytes for tensor in read_headers(tmp_path).values())
    assert info.total_bytes == info.front_bytes + info.expert_bytes == stored
    assert info.bytes_per_expert * spec.num_experts * spec.num_layers == info.expert_bytes
    assert info.dtype == str(MODELS[name].dtype).removeprefix("torch.") == spec.dtype


def test_a_tied_model_may_store_its_head_all_the_same(broken: Path):
    total = check(broken).total_bytes
    change_tensors(broken, lm_head__weight=torch.zeros(264, 32))
    assert check(broken).total_bytes == total


def test_headers_need_no_torch(single: Path):
    assert "torch" not in vars(checkpoint)
    assert {"torch"}.isdisjoint(vars(sys.modules["cluster.models.families.granite_moe"]))


def test_missing_tensor_is_named_with_both_spellings(broken: Path):
    change_tensors(broken, **{f"{LAYER}router.layer.weight": None})
    with pytest.raises(
        ModelError, match=rf"lacks tensor {LAYER}router\.layer\.weight \(or .*router\.weight\) \[8, 32\]"
    ):
        check(broken)


def test_untied_model_without_head(broken: Path):
    raw = json.loads((broken / "config.json").read_text()) | {"tie_word_embeddings": False}
    (broken / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"lacks tensor lm_head\.weight \[264, 32\]"):
        check(broken)


def test_attention_bias_without_biases(broken: Path):
    raw = json.loads((broken / "config.json").read_text()) | {"attention_bias": True}
    (broken / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"lacks tensor model\.layers\.0\.self_attn\.q_proj\.bias \[32\]"):
        check(broken)


def test_wrong_shape_shows_both(broken: Path):
    change_tensors(broken, **{f"{LAYER}input_linear.weight": torch.zeros(8, 33, 32)})
    with pytest.raises(ModelError, match=r"input_linear\.weight has shape \[8, 33, 32\].* asks for \[8, 32, 32\]"):
        check(broken)


def test_quantised_tensor(broken: Path):
    change_tensors(broken, **{f"{LAYER}output_linear.weight": torch.zeros(8, 32, 16, dtype=torch.int8)})
    with pytest.raises(ModelError, match=r"output_linear\.weight is stored as I8: only F32, BF16, F16"):
        check(broken)


def test_file_cut_off_in_the_data(broken: Path):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is cut off: .* ends at byte"):
        check(broken)


@pytest.mark.parametrize("content", [b"", b"\x10\x00", (1000).to_bytes(8, "little") + b"{}", b"\xff" * 32])
def test_file_cut_off_in_the_header(broken: Path, content: bytes):
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is cut off"):
        check(broken)


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff\xfe", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1]}}'])
def test_file_that_is_no_safetensors(broken: Path, text: bytes):
    (broken / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ModelError, match=r"model\.safetensors.*(not a safetensors file|malformed)"):
        check(broken)


DEEP = b"[" * 200_000 + b"]" * 200_000


@pytest.mark.parametrize(
    "text", [DEEP, b'{"a": ' + DEEP + b"}", b'{"a": {"b":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["lists", "value", "objects", "number"],
)  # fmt: skip
def test_json_of_a_stranger(broken: Path, text: bytes):
    (broken / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ModelError, match="is not a safetensors file"):
        check(broken)
    (broken / "model.safetensors").unlink()
    for name in ("model.safetensors.index.json", "config.json", "generation_config.json"):
        (broken / name).write_bytes(text)
    for read in (read_headers, read_spec):
        with pytest.raises(ModelError, match="can't be read"):
            read(broken)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1e999]}, {"shape": [-1, -32]}, {"shape": [32.0]}, {"shape": [True, 32]}, {"shape": ["32"]},
        {"shape": "32"}, {"shape": [10**30]}, {"shape": [10**15] * 100_000}, {"shape": [[32]]}, {"shape": None},
        {"dtype": ["F32"]}, {"dtype": None}, {"data_offsets": [0]}, {"data_offsets": [0, 1e999]},
        {"data_offsets": [0, 64, 128]}, {"data_offsets": {"0": 1}}, {"data_offsets": [0, 10**400]},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_headers_of_a_stranger(broken: Path, change: dict):
    change_header(broken, lambda header: header["model.norm.weight"].update(change))
    with pytest.raises(ModelError, match=r"model\.norm\.weight") as caught:
        check(broken)
    assert len(str(caught.value)) < 1000


def test_a_header_longer_than_the_format_allows_is_not_read(broken: Path):
    with (broken / "model.safetensors").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # a hole, which takes no space
    with pytest.raises(ModelError, match=r"its header has 200,000,000 bytes, safetensors allows 100,000,000"):
        check(broken)


FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", FILES)
def test_files_without_end_or_of_other_kinds(broken: Path, name: str):
    def read() -> None:
        read_spec(broken)
        Tokenizer.load(broken)

    (broken / name).unlink(missing_ok=True)
    with (broken / name).open("wb") as file:
        file.truncate(300 * 2**20)
    with pytest.raises(ModelError, match=rf"{name}.* can't be read: it has more than"):
        read()
    (broken / name).unlink()
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo, Path.mkdir):
        make(broken / name)
        with pytest.raises(ModelError, match=rf"{name}.* can't be read: it is no regular file"):
            read()
        (broken / name).rmdir() if (broken / name).is_dir() else (broken / name).unlink()


def test_a_pipe_is_no_file_of_weights(broken: Path):
    (broken / "model.safetensors").unlink()
    os.mkfifo(broken / "model.safetensors")
    with pytest.raises(ModelError, match="no regular file"):
        check(broken)


@pytest.mark.parametrize("name", ["..", "", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "/dev/zero", "config.json"])
def test_shards_named_by_a_stranger(broken_shards: Path, name: str):
    (broken_shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError):
        read_headers(broken_shards)


@pytest.mark.parametrize("offsets", [[0, 10**9], [-4, 124], [128, 0]])
def test_offsets_outside_the_file(broken: Path, offsets: list[int]):
    change_header(broken, lambda header: header["model.norm.weight"].update(data_offsets=offsets))
    with pytest.raises(ModelError, match=r"cut off: model\.norm\.weight"):
        check(broken)


def test_offsets_that_do_not_fit_the_shape(broken: Path):
    change_header(broken, lambda header: header["model.norm.weight"].update(data_offsets=[0, 64]))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is F32 \[32\] but takes 64 bytes"):
        check(broken)


def test_missing_shard(broken_shards: Path):
    shard = sorted(broken_shards.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        check(broken_shards)


def test_index_that_promises_too_much(broken_shards: Path):
    index = broken_shards / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.ghost"] = raw["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"says that model\.ghost is in model-"):
        check(broken_shards)
    index.write_text(json.dumps({"weight_map": ["model.norm.weight"]}))
    with pytest.raises(ModelError, match="has no weight_map"):
        check(broken_shards)


def test_index_does_not_lead_out_of_its_directory(broken_shards: Path):
    outside = broken_shards.parent / "secret.safetensors"
    shutil.copy(next(broken_shards.glob("*.safetensors")), outside)
    (broken_shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": f"../{outside.name}"}}))
    with pytest.raises(ModelError, match=r"secret\.safetensors is missing"):
        read_headers(broken_shards)


def test_no_weights_at_all(broken: Path):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors nor"):
        check(broken)


def test_resolve_model(single: Path, tmp_path: Path, monkeypatch):
    assert resolve_model(str(single)) == single
    with pytest.raises(ModelError, match=r"is a file: give the directory"):
        resolve_model(str(single / "config.json"))
    for name in ("nowhere", "./no/such/dir", "a/b/c"):
        with pytest.raises(ModelError, match=r"is no directory, and no Hub id"):
            resolve_model(name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / name))
    assert resolve_model("ibm/PowerMoE-3b") == tmp_path / "ibm/PowerMoE-3b"


def test_a_commit_of_the_hub_is_the_same_on_every_machine(single: Path, monkeypatch):
    commit = "0123456789" * 4
    elsewhere = f"/elsewhere/models--ibm--PowerMoE-3b/snapshots/{commit}"
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, revision, **_: asked.append((name, revision)) or str(single)
    )
    assert local_copy(elsewhere) == single
    assert asked == [("ibm/PowerMoE-3b", commit)]
    assert local_copy(str(single)) == single
    assert local_copy("/not/here") == Path("/not/here"), "whoever reads it says that it is not there"
    assert resolve_model("ibm/PowerMoE-3b", known=elsewhere) == Path(elsewhere)
    assert len(asked) == 1, "a newer commit is nothing to those that serve"
    for other in ("ibm/PowerMoE-3b-base", "moe/PowerMoE-3b"):
        assert not is_commit_of(other, elsewhere)


def test_hub_errors_have_a_way_out(monkeypatch):
    import httpx
    from huggingface_hub import errors

    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
    for error, way_out in (
        (errors.RepositoryNotFoundError("no", response=response), "check the spelling"),
        (errors.GatedRepoError("no", response=response), "accept its terms"),
        (ConnectionError("no route"), "check the network"),
    ):

        def fail(*_args, error=error, **_kwargs):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(ModelError, match=f"model='owner/name'.*{way_out}"):
            resolve_model("owner/name")


@pytest.mark.parametrize("name", ["granite", "bf16-sharded-own-names"])
def test_experts_are_loaded_by_slices(tmp_path: Path, name: str):
    info, told = check(write_checkpoint(MODELS[name], tmp_path)), []
    ids = [(0, 1, 5), (2, 3, 4), (7,), (), (0, 2, 4, 6), tuple(range(8))][: info.spec.num_layers]
    store = load_experts(Weights(info, PLAIN, told.append), ids)
    assert sum(told) == info.bytes_per_expert * sum(map(len, ids))
    state = load_reference(tmp_path).state_dict()
    for layer, (held, weights) in enumerate(zip(ids, store.layers, strict=True)):
        experts = f"model.layers.{layer}.block_sparse_moe.experts."
        assert torch.equal(weights.gate_up_EFD, state[f"{experts}gate_up_proj"][list(held)])
        assert torch.equal(weights.down_EDF, state[f"{experts}down_proj"][list(held)])


@pytest.mark.parametrize("own_names", [False, True])
def test_experts_stored_one_by_one_are_read_if_they_are_held(tmp_path: Path, monkeypatch, own_names: bool):
    """Layer 1 has none; what is stored stacked is read by slices all the same."""
    model = replace(FAMILIES["qwen3_moe"]["qwen3_moe-dense"], own_names=own_names)
    info, told, read, really_read = check(write_checkpoint(model, tmp_path)), [], [], weights_module._read
    monkeypatch.setattr(
        weights_module, "_read", lambda out, tensor, at: read.append(tensor) or really_read(out, tensor, at)
    )
    ids = [(0, 1, 5), (3,)]
    store = load_experts(Weights(info, PLAIN, told.append), ids)
    assert sum(told) == info.bytes_per_expert * 4
    assert len({tensor.name for tensor in read}) == (4 if own_names else 12)
    assert len({tensor.file for tensor in read}) > 1
    state = load_reference(tmp_path).state_dict()
    for layer, held, weights in zip((0, 2), ids, store.layers, strict=True):
        experts = f"model.layers.{layer}.mlp.experts."
        assert torch.equal(weights.gate_up_EFD, state[f"{experts}gate_up_proj"][list(held)])
        assert torch.equal(weights.down_EDF, state[f"{experts}down_proj"][list(held)])


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path):
    info = check(write_checkpoint(MODELS["granite"], tmp_path))
    os.truncate(tmp_path / "model.safetensors", 9000)
    with pytest.raises(ModelError, match=r"model\.safetensors is cut off within model\.layers"):
        load_experts(Weights(info, PLAIN), info.all_experts)


def test_front_is_loaded_without_experts(single: Path):
    info, told = check(single), []
    front = load_front(Weights(info, PLAIN_BFLOAT16, told.append))
    assert sum(told) == info.front_bytes
    assert front.weights.head.weight_OD is front.weights.embed_VD, "a tied head takes no memory"
    assert front.weights.embed_VD.dtype == torch.bfloat16


def test_contiguous_runs():
    assert list(contiguous_runs([3, 4, 5, 9])) == [(0, 3, 3), (3, 9, 1)]
    assert list(contiguous_runs([])) == []


def test_made_checkpoint_is_a_checkpoint(tmp_path: Path, monkeypatch):
    small = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 8}
    monkeypatch.setitem(maker.SHAPES, "small", maker.SHAPES["1b-a400m"] | small)
    monkeypatch.setattr(maker, "PIECE", 1000)
    maker.make_checkpoint("small", tmp_path, layers=2)
    assert check(tmp_path).dtype == "bfloat16"
    logits = load_reference(tmp_path)(torch.tensor([[1, 2, 3, 1]])).logits[0]
    assert len(set(logits.argmax(-1).tolist())) > 1
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.norm.weight"], torch.ones(32).bfloat16())


@pytest.mark.parametrize("shape", ["qwen3-30b-a3b", "granite-swash-3b-a600m", "mixtral-8x7b", "olmoe-1b-7b"])
def test_made_checkpoints_of_other_families_in_shards(shape: str, tmp_path: Path, monkeypatch):
    small = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
    small |= {"intermediate_size": 8, "bos_token_id": None, "pad_token_id": None}
    small |= {"moe_intermediate_size": 8} if "moe_intermediate_size" in maker.SHAPES[shape] else {}
    small |= {"shared_intermediate_size": 8} if "shared_intermediate_size" in maker.SHAPES[shape] else {}
    monkeypatch.setitem(maker.SHAPES, shape, maker.SHAPES[shape] | small)
    monkeypatch.setattr(maker, "SHARD_BYTES", 40_000)
    maker.make_checkpoint(shape, tmp_path, layers=3)
    assert len({info.file for info in read_headers(tmp_path).values()}) > 1
    found = check(tmp_path)
    assert found.spec.num_layers == 3
    logits = load_reference(tmp_path)(torch.tensor([[1, 2, 3, 1]])).logits[0]
    assert len(set(logits.argmax(-1).tolist())) > 1
