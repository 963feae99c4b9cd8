"""Hugging Face directories with pytorch_model.bin are read as those with safetensors; nothing of a file is run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_tools.conversion import Request, convert
from checkpoints_tools.errors import ConversionError
from checkpoints_tools.formats import open_any, written_formats
from checkpoints_tools.regions import Key
from megalemur.checkpoint.errors import CheckpointError, DamagedCheckpoint
from megalemur.model.names import hf_shapes
from tests.support.malice import patience, torch_file_of
from tests.support.tiny import write_llama

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
Weights = dict[str, torch.Tensor]


def weights_of(source: Path) -> Weights:
    return load_file(source / "model.safetensors")


def write_bin(directory: Path, source: Path, weights: Weights, *, files: int = 1) -> Path:
    """The model in `source` with these weights in .bin files."""
    directory.mkdir()
    for name in ("config.json", "generation_config.json"):
        (directory / name).write_bytes((source / name).read_bytes())
    if files == 1:
        torch.save(weights, directory / SINGLE)
        return directory
    names = list(weights)
    where = {name: f"pytorch_model-{n % files + 1:05d}-of-{files:05d}.bin" for n, name in enumerate(names)}
    for file in set(where.values()):
        torch.save({name: weights[name] for name in names if where[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "hf", num_layers=2, dtype=torch.bfloat16)


def assert_same(directory: Path, weights: Weights) -> None:
    opened = open_any(directory)
    assert opened.format == "hf-bin" and {key.name for key in opened.dtypes} == weights.keys()
    for name, tensor in weights.items():
        key, rows = Key("weight", name), tensor.shape[0]
        assert torch.equal(opened.read(key, 0, rows), tensor) and opened.dtypes[key] == tensor.dtype
        assert torch.equal(opened.read(key, 1, rows // 2), tensor[1 : rows // 2])


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_tensor_is_read(tmp_path: Path, files: int, dtype: torch.dtype):
    source = write_llama(tmp_path / "hf", num_layers=2, dtype=dtype)
    assert_same(write_bin(tmp_path / "bin", source, weights_of(source), files=files), weights_of(source))


def test_what_transformers_reads_is_what_is_converted(tmp_path: Path, source: Path):
    from transformers import AutoModelForCausalLM

    opened = open_any(write_bin(tmp_path / "bin", source, weights_of(source), files=2))
    convert(opened, opened, Request(tmp_path / "out", "hf"))
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "bin", dtype="auto").state_dict()
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 64


def test_it_is_not_written():
    assert "hf-bin" not in written_formats()


def test_views_of_one_storage(tmp_path: Path, source: Path):
    # all layers' weights of one shape in one storage, rows and columns of larger matrices: what regions can say
    weights = weights_of(source)
    both = torch.stack([weights[f"model.layers.{n}.mlp.gate_proj.weight"] for n in (0, 1)])
    wide = torch.cat([weights[f"model.layers.{n}.mlp.down_proj.weight"] for n in (0, 1)], 1)
    norms = torch.stack([weights[f"model.layers.{n}.input_layernorm.weight"] for n in (0, 1)], 1)
    views = {
        **{f"model.layers.{n}.mlp.gate_proj.weight": both[n] for n in (0, 1)},
        **{f"model.layers.{n}.mlp.down_proj.weight": wide[:, 96 * n : 96 * (n + 1)] for n in (0, 1)},
        **{f"model.layers.{n}.input_layernorm.weight": norms[:, n] for n in (0, 1)},
    }
    assert not any(tensor.is_contiguous() for name, tensor in views.items() if "gate" not in name)
    assert_same(write_bin(tmp_path / "bin", source, weights | views), weights)


def test_parameters_and_derived_tensors(tmp_path: Path, source: Path):
    weights = weights_of(source)
    stored: Weights = {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()}
    stored["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert_same(write_bin(tmp_path / "bin", source, stored), weights)


def test_a_head_that_shares_the_embeddings_storage_but_is_not_tied(tmp_path: Path, source: Path):
    weights = weights_of(source)
    weights[HEAD] = weights[EMBEDDING]
    assert_same(write_bin(tmp_path / "bin", source, weights), weights)


@pytest.mark.parametrize("shared", [True, False])
def test_a_tied_head_is_the_embedding(tmp_path: Path, shared: bool):
    source = write_llama(tmp_path / "hf", num_layers=2, tie_embeddings=True)
    weights = weights_of(source)
    assert HEAD not in weights
    stored = weights | {HEAD: weights[EMBEDDING] if shared else torch.zeros(251, 64)}
    directory = write_bin(tmp_path / "bin", source, stored)
    assert_same(directory, weights)
    assert any(HEAD in note for note in open_any(directory).notes)


def turned(weights: Weights) -> None:
    weights[GATE] = weights[GATE].t().contiguous().t()


def expanded(weights: Weights) -> None:
    weights[GATE] = weights[GATE][:1].expand(96, 64)


BAD: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "missing": (lambda w: w.pop(GATE), "gate_proj.weight.*missing"),
    "surplus": (lambda w: w.update(extra=torch.ones(2)), "extra"),
    "another shape": (lambda w: w.update({GATE: torch.ones(3, 64)}), "gate_proj"),
    "another rank": (lambda w: w.update({GATE: torch.ones(96, 64, 1)}), "gate_proj"),
    "a number": (lambda w: w.update({GATE: torch.tensor(1.0)}), "gate_proj"),
    "quantized": (lambda w: w.update({GATE: torch.ones(96, 64).to(torch.int8)}), "gate_proj.weight is int8"),
    "turned": (turned, "gate_proj.weight is stored transposed.*contiguous"),
    "expanded": (expanded, "gate_proj.weight is stored transposed or expanded"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, source: Path, name: str):
    change, message = BAD[name]
    weights = weights_of(source)
    change(weights)
    with pytest.raises(ConversionError, match=message):
        open_any(write_bin(tmp_path / "bin", source, weights))


def with_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


FIRST = "pytorch_model-00001-of-00003.bin"
INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a file outside": (lambda m: m.update({GATE: "../hf/x.bin"}), "no .bin file of this directory"),
    "an absolute file": (lambda m: m.update({GATE: "/etc/passwd"}), "no .bin file of this directory"),
    "another kind of file": (lambda m: m.update({GATE: "x.safetensors"}), "no .bin file of this directory"),
    "a number": (lambda m: m.update({GATE: 7}), "no .bin file of this directory"),
    "a file that is not there": (lambda m: m.update({GATE: "x.bin"}), "x.bin"),
    "a tensor that is not there": (lambda m: m.update(extra=FIRST), "extra"),
    "a tensor that is not listed": (lambda m: m.pop(GATE), "gate_proj"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, source: Path, name: str):
    change, message = INDEXES[name]
    directory = write_bin(tmp_path / "bin", source, weights_of(source), files=3)
    with_index(directory, change)
    with pytest.raises(DamagedCheckpoint, match=message):
        open_any(directory)


def test_two_sets_of_weights_are_refused(tmp_path: Path, source: Path):
    directory = write_bin(tmp_path / "bin", source, weights_of(source), files=3)
    torch.save(weights_of(source), directory / SINGLE)
    with pytest.raises(ConversionError, match="remove the one"):
        open_any(directory)


def test_code_in_a_file_is_not_run(tmp_path: Path, source: Path):
    canary = tmp_path / "canary"
    directory = write_bin(tmp_path / "bin", source, weights_of(source))
    (directory / SINGLE).write_bytes(torch_file_of(canary))
    with patience(), pytest.raises(CheckpointError):
        open_any(directory)
    assert not canary.exists()


class _Runs:
    def __init__(self, canary: Path):
        self._canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._canary),)


def test_code_beside_good_weights_is_named_and_not_run(tmp_path: Path, source: Path):
    canary, weights = tmp_path / "canary", weights_of(source)
    directory = write_bin(tmp_path / "bin", source, weights | {"payload": _Runs(canary)})
    assert any("posix.mkdir" in note for note in open_any(directory).notes)
    assert_same(directory, weights)
    assert not canary.exists()


def test_every_tensor_of_the_model_is_there(source: Path):
    # the shapes that the tests above rely on
    assert hf_shapes(open_any(source).model).keys() == weights_of(source).keys()
