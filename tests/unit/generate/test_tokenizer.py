import io
from pathlib import Path

import pytest

from megalemur.generate.tokenizer import load_tokenizer, stop_ids

TEXT = "def add(a, b):\n    return a + b\n"


def write_sentencepiece(directory: Path) -> Path:
    """A BPE model of 300 pieces with byte fallback: unknown 0, begin 1, end 2."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, "class Point: pass", "import os, sys"] * 30),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


def write_tokenizers(directory: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_sentencepiece_puts_the_beginning_in_front_and_comes_back(tmp_path):
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path))
    ids = tokenizer.encode(TEXT)
    assert ids[0] == 1 and 1 not in ids[1:]
    assert tokenizer.decode(ids[1:]) == TEXT
    assert tokenizer.eos == 2


def test_tokenizer_json_comes_back(tmp_path):
    tokenizer = load_tokenizer(write_tokenizers(tmp_path))
    ids = tokenizer.encode(TEXT)
    assert ids[0] == 0
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.eos == 1


def test_sentencepiece_is_preferred_where_both_lie(tmp_path):
    write_tokenizers(tmp_path)
    write_sentencepiece(tmp_path)
    assert load_tokenizer(tmp_path).eos == 2


def test_a_directory_without_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither tokenizer\.model nor tokenizer\.json; copy"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("said", "stops"), [("7", {2, 7}), ("[7, 9]", {2, 7, 9}), ("null", {2})])
def test_a_text_ends_where_generation_config_says_too(tmp_path, said, stops):
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path))
    assert stop_ids(tmp_path, tokenizer) == {2}
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {said}}}')
    assert stop_ids(tmp_path, tokenizer) == stops


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_generation_config_is_named(tmp_path, text):
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path))
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be used"):
        stop_ids(tmp_path, tokenizer)
