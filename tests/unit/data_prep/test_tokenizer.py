"""Ids of the fast engine are the reference's; control tokens never come from text, whichever tokenizer it is."""

import json
import os
import time

import pytest

from data_prep.convert import tokenizer_json
from data_prep.engine import Fastokens, fast_engine, first_difference
from data_prep.tokenizer import load_tokenizer
from tests.faults.fuzz_tokens import compare, strings
from tests.support.datasets import MODEL


def test_fuzzed_strings_have_sentencepiece_s_ids():
    assert compare(strings(3000, seed=os.getpid()))[0] == 3000


def test_a_conversion_with_merges_in_another_order_is_noticed():
    definition = tokenizer_json(MODEL.read_bytes())
    definition["model"]["merges"].reverse()
    different = first_difference(Fastokens(definition), load_tokenizer(MODEL), ["def f(x):\n    return x"])
    assert different == 0


@pytest.mark.parametrize("text", ["a" * 2_000_000, "def f(x): return 1\n" * 100_000, " " * 1_000_000])
def test_long_documents_take_time_in_proportion(text):
    """A tokenizer of this kind took 6.6 hours for 16 M characters: quadratic. Sixteen times the text must take nearer
    to 16 than to 256 times as long."""
    engine = fast_engine(MODEL)
    engine.encode([text[:1000]])
    seconds = []
    for part in (text[: len(text) // 16], text):
        began = time.process_time()
        engine.encode([part])
        seconds.append(time.process_time() - began)
    assert seconds[1] < 64 * max(seconds[0], 0.01), seconds


def byte_level(directory, *added):
    """A tokenizer.json of bytes, with added tokens as (text, special)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for text, special in added:
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_control_tokens_of_a_tokenizer_json_stay_text(tmp_path):
    path = byte_level(tmp_path, ("<|endoftext|>", True), ("<|im_start|>", False), ("    ", False))
    tokenizer = load_tokenizer(path)
    assert tokenizer.record.vocab_size == 259 and tokenizer.record.eos_id == 256
    assert set(tokenizer.control) == {"<|endoftext|>", "<|im_start|>"}
    text = "a<|endoftext|>b<|im_start|>user    x"
    encoded = tokenizer.encode([text, ""])
    ids = encoded.text(0).tolist()
    assert 256 not in ids and 257 not in ids, "names of control tokens are spelled out"
    assert 258 in ids, "a run of spaces is no control token"
    assert tokenizer.decode(ids) == text and encoded.lengths[1] == 0
    fast = fast_engine(path)
    if fast is not None:
        assert first_difference(fast, tokenizer, [text, "", "    y"]) is None


def test_names_in_tokenizer_config_json_win(tmp_path):
    path = byte_level(tmp_path, ("<|endoftext|>", True), ("<|stop|>", True))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|stop|>"}}))
    assert load_tokenizer(path).record.eos_id == 257


@pytest.mark.parametrize("content", ["{}", "no json", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"--tokenizer .*tokenizer\.json: neither a SentencePiece model nor"):
        load_tokenizer(tmp_path)


def test_a_directory_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds neither"):
        load_tokenizer(tmp_path)
