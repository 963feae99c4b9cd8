"""Meta's releases are read as what they were made from, and give the same logits; what does not fit is named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_tools.conversion import Request, convert
from checkpoints_tools.errors import ConversionError
from checkpoints_tools.formats import open_any
from checkpoints_tools.opened import Opened
from checkpoints_tools.regions import Key
from megalemur.checkpoint.errors import DamagedCheckpoint
from megalemur.config.model import RopeScaling
from megalemur.model.names import hf_shapes
from tests.support.meta_release import alternating, write_meta
from tests.support.tiny import write_llama

SHAPE: dict[str, Any] = {"num_layers": 2, "vocab_size": 252, "max_position_embeddings": 4096}
SHAPES = {
    "grouped queries": {},
    "a key for each head": {"num_query_groups": 8},
    "tied": {"tie_embeddings": True},
}


def assert_same(opened: Opened, source: Path) -> None:
    """Every tensor, whole and by rows that begin in the middle of a head, equals the Hugging Face one."""
    reference = open_any(source)
    assert opened.dtypes == reference.dtypes
    for key in reference.dtypes:
        rows = hf_shapes(reference.model)[key.name][0]
        assert torch.equal(opened.read(key, 0, rows), reference.read(key, 0, rows)), key
        first, last = rows // 3 + 1, rows - 1
        assert torch.equal(opened.read(key, first, last), reference.read(key, first, last)), key


@pytest.mark.parametrize("embedding", [0, 1], ids=["embedding by rows", "embedding by columns"])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_tensor_is_the_one_it_was_made_from(tmp_path: Path, shape: dict[str, Any], parts: int, embedding: int):
    write_llama(tmp_path / "hf", dtype=torch.bfloat16, **SHAPE | shape)
    write_meta(tmp_path / "meta", tmp_path / "hf", parts=parts, embedding=embedding)
    opened = open_any(tmp_path / "meta")
    assert (opened.format, opened.facts) == ("meta", {"parts": parts})
    assert opened.model == open_any(tmp_path / "hf").model
    assert_same(opened, tmp_path / "hf")


WIDE: dict[str, Any] = {"num_layers": 2, "vocab_size": 256, "hidden_size": 128, "num_attention_heads": 16}
EIGHT = {
    "a key for each head": {"num_query_groups": 16},
    "a group for each part": {"num_query_groups": 8},
    "tied": {"num_query_groups": 8, "tie_embeddings": True},
}


@pytest.mark.parametrize("embedding", [0, 1], ids=["embedding by rows", "embedding by columns"])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", EIGHT.values(), ids=EIGHT.keys())
def test_the_converted_files_hold_the_tensors_that_the_release_was_made_from(
    tmp_path: Path, shape: dict[str, Any], parts: int, embedding: int
):
    write_llama(tmp_path / "hf", dtype=torch.bfloat16, **WIDE | shape)
    write_meta(tmp_path / "meta", tmp_path / "hf", parts=parts, embedding=embedding)
    assert len(list((tmp_path / "meta").glob("consolidated.*.pth"))) == parts
    source = open_any(tmp_path / "meta")
    convert(source, source, Request(tmp_path / "out", "hf"))
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


def test_parts_that_change_places_are_other_tensors(tmp_path: Path):
    # the test before this one could fail: no order of the parts but their numbers' gives the model
    write_llama(tmp_path / "hf", dtype=torch.bfloat16, **WIDE)
    meta = write_meta(tmp_path / "meta", tmp_path / "hf", parts=4)
    files = [meta / "consolidated.01.pth", meta / "consolidated.02.pth"]
    for file, data in zip(files, [file.read_bytes() for file in reversed(files)], strict=True):
        file.write_bytes(data)
    opened, wanted = open_any(meta), load_file(tmp_path / "hf" / "model.safetensors")
    for key in opened.dtypes:
        same = torch.equal(opened.read(key, 0, len(wanted[key.name])), wanted[key.name])
        assert same == ("norm" in key.name), key


def test_neighbours_that_are_rotated_give_the_scores_of_halves_that_are():
    # what makes the writer of releases believable: Meta rotates complex numbers of neighbours, Hugging Face halves
    heads, size, tokens, width = 4, 16, 7, 24
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    q, k = torch.randn(2, heads * size, width, generator=generator, dtype=torch.float64)
    angles = torch.outer(
        torch.arange(tokens, dtype=torch.float64), 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    )

    def by_neighbours(weight: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ weight.T).view(tokens, heads, size // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)

    def by_halves(weight: torch.Tensor) -> torch.Tensor:
        one, other = (x @ weight.T).view(tokens, heads, 2, size // 2).unbind(2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)

    def scores(rotated: Any, *weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("qhd,khd->hqk", *(rotated(weight) for weight in weights))

    wanted = scores(by_halves, q, k)
    assert torch.allclose(scores(by_neighbours, alternating(q, heads), alternating(k, heads)), wanted, atol=1e-9)
    assert not torch.allclose(scores(by_neighbours, q, k), wanted, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_widths(tmp_path: Path, dtype: torch.dtype):
    write_llama(tmp_path / "hf", dtype=dtype, **SHAPE)
    write_meta(tmp_path / "meta", tmp_path / "hf", parts=2)
    assert_same(open_any(tmp_path / "meta"), tmp_path / "hf")


def logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    tokens = torch.arange(40).view(2, 20) * 5 % 250
    with torch.no_grad():
        return model(tokens).logits


def test_what_is_converted_gives_the_logits_of_the_source(tmp_path: Path):
    write_llama(tmp_path / "hf", **SHAPE)
    write_meta(tmp_path / "meta", tmp_path / "hf", parts=2)
    (tmp_path / "tokenizer.model").write_bytes(b"a tokenizer that several models share")
    source = open_any(tmp_path / "meta")
    convert(source, source, Request(tmp_path / "out", "hf"))
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "hf"))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"a tokenizer that several models share"


def test_rows_that_are_not_permuted_give_other_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # the test above could fail: a release whose rows are in Hugging Face's order is read as another model
    write_llama(tmp_path / "hf", **SHAPE)
    monkeypatch.setattr("tests.support.meta_release.alternating", lambda weight, heads: weight)
    write_meta(tmp_path / "meta", tmp_path / "hf", parts=2)
    source = open_any(tmp_path / "meta")
    convert(source, source, Request(tmp_path / "out", "hf"))
    difference = (logits(tmp_path / "out") - logits(tmp_path / "hf")).abs().max()
    assert difference > 1e-4
    key = Key("weight", "model.layers.0.self_attn.q_proj.weight")
    original = open_any(tmp_path / "hf").read(key, 0, 64)
    assert torch.equal(alternating(source.read(key, 0, 64), 8), original)


SAID = {
    "Llama 2": ({}, 4096, 10000.0, None),
    "Code Llama": ({"rope_theta": 1e6}, 16_384, 1e6, None),
    "Llama 3.1": ({"rope_theta": 500000.0, "use_scaled_rope": True, "rope_scaling_factor": 8}, 131_072, 500000.0, 8.0),
    "Llama 3.2 1B": ({"rope_theta": 500000.0, "use_scaled_rope": True}, 131_072, 500000.0, 32.0),
}


@pytest.mark.parametrize("name", SAID)
def test_what_params_json_does_not_say_is_taken_from_the_model_cards_and_noted(tmp_path: Path, name: str):
    params, context, theta, factor = SAID[name]
    write_llama(tmp_path / "hf", **SHAPE)
    opened = open_any(write_meta(tmp_path / "meta", tmp_path / "hf", parts=1, **params))
    scaling = factor and RopeScaling(
        factor=factor, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192
    )
    model = opened.model
    assert (model.max_position_embeddings, model.rope_theta, model.rope_scaling) == (context, theta, scaling)
    assert any(f"taken to be {context} tokens" in note for note in opened.notes)
    assert any("factor; taken to be 32" in note for note in opened.notes) == (name == "Llama 3.2 1B")
    assert any("rope.freqs" in note for note in opened.notes)


def test_a_vocabulary_of_llama_3_has_its_context_and_its_tokens(tmp_path: Path):
    write_llama(tmp_path / "hf", **SHAPE | {"vocab_size": 128_256, "num_layers": 1, "hidden_size": 16})
    write_meta(tmp_path / "meta", tmp_path / "hf", parts=1, rope_theta=500000.0)
    opened = open_any(tmp_path / "meta")
    assert opened.model.max_position_embeddings == 8192
    assert opened.config is not None and opened.config["bos_token_id"] == 128_000
    assert json.loads(opened.small_files["generation_config.json"])["eos_token_id"] == 128_001


def test_the_caller_says_what_the_files_do_not(tmp_path: Path):
    write_llama(tmp_path / "hf", **SHAPE)
    write_meta(tmp_path / "meta", tmp_path / "hf", parts=2)
    model = open_any(tmp_path / "meta").model.model_copy(update={"max_position_embeddings": 2048})
    opened = open_any(tmp_path / "meta", model=model)
    assert opened.model.max_position_embeddings == 2048
    with pytest.raises(ConversionError, match="num_attention_heads"):
        open_any(tmp_path / "meta", model=model.model_copy(update={"num_attention_heads": 4}))


def test_params_under_the_key_model(tmp_path: Path):
    write_llama(tmp_path / "hf", **SHAPE)
    write_meta(tmp_path / "meta", tmp_path / "hf", parts=1)
    where = tmp_path / "meta" / "params.json"
    where.write_text(json.dumps({"model": json.loads(where.read_text())}))
    assert_same(open_any(tmp_path / "meta"), tmp_path / "hf")


BAD_PARAMS = {
    "another width": ({"dim": 128}, "dim|columns"),
    "another depth": ({"n_layers": 3}, "n_layers is 3"),
    "ten million layers": ({"n_layers": 10_000_000}, "n_layers"),
    "heads that do not divide": ({"n_heads": 7}, "num_attention_heads=7"),
    "other groups": ({"n_kv_heads": 2}, "wk.weight"),
    "groups that do not divide": ({"n_kv_heads": 3}, "num_key_value_heads=3|wk"),
    "another vocabulary": ({"vocab_size": 300}, "vocab_size is 300"),
    "another ffn": ({"multiple_of": 256}, "make 256"),
    "a multiplier that does not fit": ({"multiple_of": 32, "ffn_dim_multiplier": 2.0}, "ffn_dim_multiplier"),
    "text for a size": ({"dim": "64"}, "dim is 64"),
    "a size of 2**40": ({"n_heads": 1 << 40}, "n_heads"),
    "a size that is missing": ({"dim": None}, "dim is None"),
    "a negative theta": ({"rope_theta": -1.0}, "rope_theta"),
    "text for an epsilon": ({"norm_eps": "small"}, "norm_eps"),
}


@pytest.mark.parametrize("name", BAD_PARAMS)
def test_params_that_do_not_fit_the_tensors_are_refused(tmp_path: Path, name: str):
    params, message = BAD_PARAMS[name]
    write_llama(tmp_path / "hf", **SHAPE)
    write_meta(tmp_path / "meta", tmp_path / "hf", parts=2, **params)
    with pytest.raises(ConversionError, match=message):
        open_any(tmp_path / "meta")


def test_an_ffn_by_metas_rule_is_accepted(tmp_path: Path):
    # 8/3 of 64 is 170, times 0.5 is 85, rounded up to 32 is 96
    write_llama(tmp_path / "hf", **SHAPE)
    write_meta(tmp_path / "meta", tmp_path / "hf", parts=2, multiple_of=32, ffn_dim_multiplier=0.5)
    assert open_any(tmp_path / "meta").model.ffn_hidden_size == 96


def changed(file: Path, change: Any) -> None:
    content = {name: tensor for name, tensor in torch.load(file, weights_only=True).items()}
    change(content)
    torch.save(content, file)


WQ, W2 = "layers.1.attention.wq.weight", "layers.1.feed_forward.w2.weight"
CHANGES = {
    "missing": (lambda c: c.pop(WQ), "wq.weight is missing"),
    "surplus": (lambda c: c.update({"layers.1.attention.wq.bias": torch.ones(3)}), "wq.bias"),
    "another shape": (lambda c: c.update({WQ: c[WQ][:-1].clone()}), "wq.weight has shape"),
    "a norm of another length": (lambda c: c.update({"norm.weight": torch.ones(3)}), "norm.weight have shapes"),
    "whole instead of split": (lambda c: c.update({W2: torch.ones(64, 96)}), "w2.weight has shape"),
    "turned": (lambda c: c.update({WQ: c[WQ].t().contiguous().t()}), "stored transposed"),
    "another dtype": (lambda c: c.update({WQ: c[WQ].half()}), "several dtypes"),
    "quantized": (lambda c: c.update({WQ: c[WQ].to(torch.int8)}), "int8"),
    "no tensor": (lambda c: c.update({WQ: "text"}), "wq.weight is missing"),
    "a part of the embedding by rows": (
        lambda c: c.update({"tok_embeddings.weight": torch.ones(126, 64)}),
        "tok_embeddings.weight",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_part_that_does_not_fit_is_named(tmp_path: Path, name: str):
    change, message = CHANGES[name]
    write_llama(tmp_path / "hf", **SHAPE)
    write_meta(tmp_path / "meta", tmp_path / "hf", parts=2)
    changed(tmp_path / "meta" / "consolidated.01.pth", change)
    with pytest.raises(ConversionError, match=message) as caught:
        open_any(tmp_path / "meta")
    assert "meta" in str(caught.value)


@pytest.mark.parametrize("name", ["layers.1.ffn_norm.weight", "norm.weight", "rope.freqs"])
@pytest.mark.parametrize("part", [1, 3])
def test_what_all_parts_hold_is_compared(tmp_path: Path, name: str, part: int):
    write_llama(tmp_path / "hf", **SHAPE)
    write_meta(tmp_path / "meta", tmp_path / "hf", parts=4)
    open_any(tmp_path / "meta")
    file = tmp_path / "meta" / f"consolidated.{part:02d}.pth"

    def turn(content: dict[str, torch.Tensor]) -> None:
        content[name].view(torch.int32)[2] ^= 1  # the last bit of the third element

    changed(file, turn)
    with pytest.raises(DamagedCheckpoint, match=rf"{file.name}: {re.escape(name)}\[2\] differs from consolidated.00"):
        open_any(tmp_path / "meta")


def test_parts_that_are_missing_or_cut_short_are_named(tmp_path: Path):
    write_llama(tmp_path / "hf", **SHAPE)
    write_meta(tmp_path / "meta", tmp_path / "hf", parts=4)
    last = tmp_path / "meta" / "consolidated.03.pth"
    data = last.read_bytes()
    last.write_bytes(data[:-100])
    with pytest.raises(DamagedCheckpoint, match=r"consolidated\.03\.pth"):
        open_any(tmp_path / "meta")
    last.unlink()
    with pytest.raises(ConversionError):
        open_any(tmp_path / "meta")
    last.write_bytes(data)
    (tmp_path / "meta" / "consolidated.01.pth").unlink()
    with pytest.raises(ConversionError, match=r"consolidated\.01\.pth is missing"):
        open_any(tmp_path / "meta")
