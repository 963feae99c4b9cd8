"""hf -> megalemur -> hf is the identity, for random models; what was damaged on the way or in the source is named."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools import hf
from checkpoints_tools.certificate import compare
from checkpoints_tools.changes import Cast
from checkpoints_tools.conversion import Request, convert
from checkpoints_tools.errors import CertificateError, ConversionError
from checkpoints_tools.formats import open_any
from checkpoints_tools.layout import Options
from checkpoints_tools.mover import digest_of
from checkpoints_tools.regions import Key
from checkpoints_tools.vocabulary import Wish, change
from megalemur.checkpoint.directory import verify_checkpoint
from megalemur.checkpoint.errors import DamagedCheckpoint
from megalemur.model.names import hf_shapes
from tests.support.tiny import write_llama

SHAPES = {
    "grouped queries": {},
    "a key for each head": {"num_query_groups": 8},
    "tied": {"tie_embeddings": True},
    "odd vocabulary": {"vocab_size": 257},
}


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_equal_weights(one: Path, other: Path) -> None:
    before, after = weights_of(one), weights_of(other)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_there_and_back_is_the_identity(tmp_path, shape, dtype):
    write_llama(tmp_path / "a", num_layers=2, dtype=dtype, **shape)
    source = open_any(tmp_path / "a")
    convert(source, source, Request(tmp_path / "b", "megalemur", Options(max_shard_bytes=60_000)))
    verify_checkpoint(tmp_path / "b")
    between = open_any(tmp_path / "b")
    assert between.format == "megalemur" and len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    convert(between, between, Request(tmp_path / "c", "hf", workers=3))
    assert_equal_weights(tmp_path / "a", tmp_path / "c")
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((tmp_path / folder / name).read_text()) for folder in "ac")
        assert {key: after.get(key) for key in before} == before


def test_transformers_computes_the_same_logits_of_the_result(tmp_path):
    from transformers import AutoModelForCausalLM

    write_llama(tmp_path / "a", num_layers=2)
    source = open_any(tmp_path / "a")
    convert(source, source, Request(tmp_path / "b", "megalemur"))
    ids = torch.randint(0, 251, (2, 20), generator=torch.Generator().manual_seed(0))
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)(ids).logits for folder in "ab"
    )
    assert torch.equal(one, other)


def test_the_certificate_has_the_digests_of_rows_that_anybody_can_compute(tmp_path):
    import xxhash

    write_llama(tmp_path / "a", num_layers=1, dtype=torch.bfloat16)
    source = open_any(tmp_path / "a")
    convert(source, source, Request(tmp_path / "b", "hf"))
    said = json.loads((tmp_path / "b/conversion.json").read_text())
    for name, tensor in weights_of(tmp_path / "a").items():
        listed = said["tensors"]["weight"][name]
        assert listed["xxh3_128"] == xxhash.xxh3_128_hexdigest(tensor.view(torch.uint8).numpy().tobytes())
        assert listed["shape"] == list(tensor.shape)
    assert said["source"]["format"] == "hf" and said["model"]["num_layers"] == 1


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_changes_no_byte(tmp_path, workers):
    write_llama(tmp_path / "a", num_layers=3)
    source = open_any(tmp_path / "a")
    for folder, count in (("b", 2), ("c", workers)):
        request = Request(tmp_path / folder, "megalemur", Options(max_shard_bytes=100_000), workers=count)
        convert(source, source, request)
    for file in (tmp_path / "b").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "c" / file.relative_to(tmp_path / "b")).read_bytes(), file


def test_a_cast_is_transformers_own(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    source = open_any(tmp_path / "a")
    convert(Cast(source, torch.bfloat16), source, Request(tmp_path / "b", "hf"))
    for name, tensor in weights_of(tmp_path / "a").items():
        assert torch.equal(weights_of(tmp_path / "b")[name], tensor.bfloat16())
    assert json.loads((tmp_path / "b/config.json").read_text())["dtype"] == "bfloat16"


def test_a_value_that_fp16_cannot_hold_is_named(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    tensors = load_file(tmp_path / "a/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(tensors, tmp_path / "a/model.safetensors", metadata={"format": "pt"})
    source = open_any(tmp_path / "a")
    with pytest.raises(ConversionError, match=r"layers\.0\.mlp\.up_proj.*fp16"):
        convert(Cast(source, torch.float16), source, Request(tmp_path / "b", "hf"))
    assert not (tmp_path / "b").exists()


def test_tensors_that_are_missing_too_much_or_of_another_shape_are_named(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    tensors = load_file(tmp_path / "a/model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(8, 64)
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(8, 64)
    save_file(tensors, tmp_path / "a/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError) as refused:
        open_any(tmp_path / "a")
    said = str(refused.value)
    assert "model.layers.0.mlp.up_proj.weight (weight) is missing" in said
    assert "k_proj" in said and "model.layers.7.mlp.up_proj.weight" in said


def test_a_damaged_native_source_is_found_while_it_is_read(tmp_path):
    write_llama(tmp_path / "a", num_layers=2)
    source = open_any(tmp_path / "a")
    convert(source, source, Request(tmp_path / "b", "megalemur"))
    file = tmp_path / "b/model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    damaged = open_any(tmp_path / "b")
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors: bytes"):
        convert(damaged, damaged, Request(tmp_path / "c", "hf"))
    assert not (tmp_path / "c").exists()


def test_a_source_that_is_cut_short_while_it_is_read_is_named(tmp_path):
    write_llama(tmp_path / "a", num_layers=2)
    source = open_any(tmp_path / "a")
    file = tmp_path / "a/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedCheckpoint, match="inside a tensor"):
        convert(source, source, Request(tmp_path / "b", "hf"))


def test_a_wrong_byte_in_the_destination_gives_no_certificate(tmp_path, monkeypatch):
    write_llama(tmp_path / "a", num_layers=2)
    source = open_any(tmp_path / "a")
    wrong = "model.layers.1.mlp.gate_proj.weight"

    def lay_out(*arguments):
        layout = hf_lay_out(*arguments)
        at = layout.regions[Key("weight", wrong)][0]

        def finish(directory, written):
            file = directory / at.file
            data = bytearray(file.read_bytes())
            data[at.offset + 7] ^= 4
            file.write_bytes(data)

        return type(layout)(**{**vars(layout), "finish": finish})

    hf_lay_out = hf.lay_out
    from checkpoints_tools import formats

    broken = formats.Format("", hf.recognises, formats.FORMATS["hf"].open, lay_out)
    monkeypatch.setattr(formats, "FORMATS", {**formats.FORMATS, "hf": broken})
    monkeypatch.setattr("checkpoints_tools.conversion.FORMATS", formats.FORMATS)
    with pytest.raises(CertificateError, match=rf"{wrong} \(weight\) differs"):
        convert(source, source, Request(tmp_path / "b", "hf"))
    assert not (tmp_path / "b").exists()


def exchanged(tensors: dict[str, torch.Tensor], kind: str) -> None:
    """Mistakes that converters make, in one layer."""
    at = "model.layers.0."
    gate, up = at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight"
    if kind == "gate and up":
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
    elif kind == "rotary":
        q = tensors[at + "self_attn.q_proj.weight"]
        tensors[at + "self_attn.q_proj.weight"] = q.view(8, 2, 4, 64).transpose(1, 2).reshape(64, 64).contiguous()
    elif kind == "key and value":
        k, v = at + "self_attn.k_proj.weight", at + "self_attn.v_proj.weight"
        for row in range(8):  # of the first group
            kept = tensors[k][row].clone()
            tensors[k][row], tensors[v][row] = tensors[v][row], kept
    else:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0).contiguous()


@pytest.mark.parametrize("kind", ["gate and up", "rotary", "key and value", "a row of the vocabulary"])
def test_the_mistakes_of_converters_are_caught_by_the_digests(tmp_path, kind):
    write_llama(tmp_path / "a", num_layers=2)
    write_llama(tmp_path / "b", num_layers=2)
    tensors = load_file(tmp_path / "b/model.safetensors")
    exchanged(tensors, kind)
    save_file(tensors, tmp_path / "b/model.safetensors", metadata={"format": "pt"})
    one, other = open_any(tmp_path / "a"), open_any(tmp_path / "b")
    shapes = hf_shapes(one.model)
    expected = {key: digest_of(one, key, shapes[key.name], lambda count: None) for key in one.dtypes}
    compare(expected, one, 2, lambda count: None)
    with pytest.raises(CertificateError, match="differs"):
        compare(expected, other, 2, lambda count: None)


def test_thirty_random_models_through_every_format(tmp_path):
    chance = random.Random(0)
    for number in range(30):
        heads = chance.choice([2, 4, 8])
        shape = {
            "num_layers": chance.randint(1, 3),
            "hidden_size": heads * chance.choice([4, 8, 10]),
            "ffn_hidden_size": chance.choice([24, 40, 52]),
            "num_attention_heads": heads,
            "num_query_groups": chance.choice([group for group in (1, 2, 4, 8) if heads % group == 0]),
            "vocab_size": chance.randint(50, 300),
            "tie_embeddings": chance.random() < 0.3,
        }
        dtype = chance.choice([torch.bfloat16, torch.float16, torch.float32])
        root = tmp_path / str(number)
        write_llama(root / "a", dtype=dtype, seed=number, **shape)
        source = open_any(root / "a")
        between = ("megalemur", "megatron", "megatron-legacy")[number % 3]
        tensor = chance.choice([1, 2]) if between == "megatron-legacy" else 1
        limit = Options(max_shard_bytes=chance.choice([3_000, 30_000, 10**9]), tensor=tensor)
        convert(source, source, Request(root / "b", between, limit))
        other = open_any(root / "b")
        assert other.format == between
        weights, carried, done = change(other, other, Wish(vocab_size=source.model.vocab_size))
        convert(weights, carried, Request(root / "c", "hf", changes=done))
        assert_equal_weights(root / "a", root / "c")
