"""Rows and tokens that are added or go: embedding, tokenizer files and config.json change together."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

from checkpoints_tools.conversion import Request, convert
from checkpoints_tools.errors import ConversionError
from checkpoints_tools.formats import open_any
from checkpoints_tools.tokens import PRESETS, count_tokens
from checkpoints_tools.vocabulary import Wish, change
from tests.support.datasets import MODEL
from tests.support.tiny import write_llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def changed(source: Path, destination: Path, wish: Wish) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    opened = open_any(source)
    weights, carried, done = change(opened, opened, wish)
    convert(weights, carried, Request(destination, "hf", changes=done))
    return load_file(source / "model.safetensors"), load_file(destination / "model.safetensors")


def tokenizer_json(tokens: int) -> str:
    vocabulary = {f"t{number}": number for number in range(tokens - 1)} | {"<unk>": tokens - 1}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "Whitespace"}})


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_new_rows_are_the_mean_or_zero_and_all_others_stay(tmp_path, fill):
    write_llama(tmp_path / "a", num_layers=1)
    before, after = changed(tmp_path / "a", tmp_path / "b", Wish(vocab_size=300, fill=fill))
    for name in before.keys() - {EMBEDDING, HEAD}:
        assert torch.equal(before[name], after[name])
    for name in (EMBEDDING, HEAD):
        assert after[name].shape == (300, 64) and torch.equal(after[name][:251], before[name])
        wanted = before[name].double().mean(0).float() if fill == "mean" else torch.zeros(64)
        assert torch.equal(after[name][251:], wanted.expand(49, -1))
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["vocab_size"] == 300
    done = json.loads((tmp_path / "b/conversion.json").read_text())["source"]["changes"]
    assert done == {"vocab_size": 300, "rows_kept": 251, "rows_filled": 49, "fill": fill}


def test_a_tied_head_needs_no_rows_of_its_own(tmp_path):
    write_llama(tmp_path / "a", num_layers=1, tie_embeddings=True)
    _, after = changed(tmp_path / "a", tmp_path / "b", Wish(vocab_size=256))
    assert after[EMBEDDING].shape == (256, 64) and HEAD not in after


def test_rows_that_are_given_are_taken(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    rows = {name: torch.randn(3, 64, generator=torch.Generator().manual_seed(1)) for name in (EMBEDDING, HEAD)}
    save_file(rows, tmp_path / "rows.safetensors")
    _, after = changed(tmp_path / "a", tmp_path / "b", Wish(vocab_size=254, fill=str(tmp_path / "rows.safetensors")))
    for name, given in rows.items():
        assert torch.equal(after[name][251:], given)
    opened = open_any(tmp_path / "a")
    with pytest.raises(ConversionError, match=r"--rows|\[5, 64\]"):
        change(opened, opened, Wish(vocab_size=256, fill=str(tmp_path / "rows.safetensors")))
    with pytest.raises(ConversionError, match="mean, zero, or a safetensors file"):
        change(opened, opened, Wish(vocab_size=256, fill="average"))


def test_only_padding_is_cut_off(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    padded = load_file(tmp_path / "a/model.safetensors")
    for name in (EMBEDDING, HEAD):
        padded[name][240:] = 0
    save_file(padded, tmp_path / "a/model.safetensors", metadata={"format": "pt"})
    _, after = changed(tmp_path / "a", tmp_path / "b", Wish(vocab_size=240))
    assert torch.equal(after[EMBEDDING], padded[EMBEDDING][:240])
    opened = open_any(tmp_path / "a")
    with pytest.raises(
        ConversionError, match=r"the last row of model\.embed_tokens\.weight in use is 239; use 240 or more"
    ):
        change(opened, opened, Wish(vocab_size=239))


def test_the_tokenizer_says_which_rows_are_tokens(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    (tmp_path / "a/tokenizer.json").write_text(tokenizer_json(230))
    opened = open_any(tmp_path / "a")
    with pytest.raises(ConversionError, match="the tokenizer has 230; use 230 or more"):
        change(opened, opened, Wish(vocab_size=229))
    before, after = changed(tmp_path / "a", tmp_path / "b", Wish(vocab_size=230))
    assert torch.equal(after[HEAD], before[HEAD][:230]), "rows that no token has are padding, whatever is in them"


def test_a_tokenizer_with_more_tokens_than_rows_is_not_this_models(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text(tokenizer_json(400))
    opened = open_any(tmp_path / "a")
    with pytest.raises(ConversionError, match="400 tokens and the model 251 rows"):
        change(opened, opened, Wish(tokenizer=tmp_path / "tokenizer"))


def test_lemurs_tokens_have_the_ids_of_the_released_model(tmp_path):
    from transformers import AutoTokenizer

    write_llama(tmp_path / "a", num_layers=1, vocab_size=32000)
    (tmp_path / "a/tokenizer.model").write_bytes(MODEL.read_bytes())
    fast = AutoTokenizer.from_pretrained(tmp_path / "a")
    fast.save_pretrained(tmp_path / "a")
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in (tmp_path / "a").iterdir()}
    before, after = changed(tmp_path / "a", tmp_path / "b", Wish(add_tokens="lemur-chat"))
    wanted = dict(zip(PRESETS["lemur-chat"], range(32000, 32005), strict=True))
    assert after[EMBEDDING].shape == (32005, 64)
    assert torch.equal(after[EMBEDDING][32001], before[EMBEDDING].double().mean(0).float())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in wanted} == wanted
    text = "def f(x): return x  # <s> 你好"
    ids = tokenizer(f"<|im_start|>user\n{text}<|im_end|>")["input_ids"]
    assert 32001 in ids and 32002 in ids and "user" in tokenizer.decode(ids)
    assert tokenizer(text)["input_ids"] == fast(text)["input_ids"], "other text has the ids of before"
    pieces = SentencePieceProcessor(model_proto=(tmp_path / "b/tokenizer.model").read_bytes())
    assert pieces.piece_to_id("<|im_end|>") == 32002 and pieces.is_control(32002)
    assert 32001 not in pieces.encode("<|im_start|>"), "text that spells it stays text"
    assert json.loads((tmp_path / "b/config.json").read_text())["pad_token_id"] == 32000


def test_a_token_that_is_added_gets_a_row_of_its_own_where_there_was_padding(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    (tmp_path / "a/tokenizer.json").write_text(tokenizer_json(230))
    before, after = changed(tmp_path / "a", tmp_path / "b", Wish(add_tokens="<a>,<b>"))
    assert after[HEAD].shape == before[HEAD].shape
    mean = before[HEAD][:230].double().mean(0).float()
    assert torch.equal(after[HEAD][230:], mean.expand(21, -1)) and torch.equal(after[HEAD][:230], before[HEAD][:230])
    assert count_tokens({"tokenizer.json": (tmp_path / "b/tokenizer.json").read_bytes()}) == 232


@pytest.mark.parametrize(
    ("tokens", "why"),
    [("t3,<new>", r"t3 \(3\) already"), ("<a>,,<b>", "commas"), ("<a>,<a>", "commas"), ("", "commas")],
)
def test_tokens_that_cannot_be_added_are_named(tmp_path, tokens, why):
    write_llama(tmp_path / "a", num_layers=1)
    (tmp_path / "a/tokenizer.json").write_text(tokenizer_json(230))
    opened = open_any(tmp_path / "a")
    with pytest.raises(ConversionError, match=why):
        change(opened, opened, Wish(add_tokens=tokens))


def test_tokens_cannot_be_added_to_no_tokenizer(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    opened = open_any(tmp_path / "a")
    with pytest.raises(ConversionError, match="--tokenizer"):
        change(opened, opened, Wish(add_tokens="<a>"))
