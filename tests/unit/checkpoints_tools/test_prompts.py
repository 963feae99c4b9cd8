"""Prompts are cut by a checkpoint's own tokenizer, and what cannot be a prompt is refused by name."""

import pytest
import tokenizers

from checkpoints_tools import prompts
from checkpoints_tools.errors import RequestError
from checkpoints_tools.prompts import TEXTS, encode, read_prompts


def byte_tokenizer() -> bytes:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE({piece: k for k, piece in enumerate(alphabet)}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return model.to_str().encode()


def sentencepiece_model() -> bytes:
    import io

    import sentencepiece

    out = io.BytesIO()
    sentences = iter([text for text in TEXTS for text in text.splitlines()])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=out, vocab_size=350, byte_fallback=True, minloglevel=2
    )
    return out.getvalue()


def test_texts_are_cut_by_the_first_tokenizer_that_can_be_read():
    made = byte_tokenizer()
    for files in (
        [{"tokenizer.json": made}, {}],
        [{}, {"tokenizer.json": made}],
        [{"tokenizer.json": b"{"}, {"tokenizer.json": made}],
    ):
        found = encode(files, None, vocab_size=256, limit=10_000)
        assert [len(ids) for ids in found.ids] == [len(text.encode()) for text in TEXTS]
        assert "tokenizer.json" in found.origin
    assert [len(ids) for ids in encode([{"tokenizer.json": made}], ["ab", "cdefgh"], vocab_size=256, limit=4).ids] == [
        2,
        4,
    ]


def test_sentencepiece_puts_the_beginning_in_front():
    found = encode([{"tokenizer.model": sentencepiece_model()}], ["the tail"], vocab_size=1000, limit=100)
    assert found.ids[0][0] == 1 and len(found.ids[0]) > 2 and "tokenizer.model" in found.origin


def test_the_texts_fit_a_forward_pass_byte_by_byte():
    found = encode([{"tokenizer.json": byte_tokenizer()}], None, vocab_size=256, limit=10_000)
    assert found.tokens <= prompts.MAX_TOKENS and len(TEXTS) >= 5


@pytest.mark.parametrize(
    "files", [{}, {"tokenizer.json": b"no JSON"}, {"tokenizer.model": b"IQ== 0\nIg== 1\n"}], ids=str
)
def test_without_a_tokenizer_ids_are_drawn_and_that_is_said(files):
    found, again = (encode([files, {}], None, vocab_size=251, limit=50) for _ in range(2))
    assert found == again and "pseudo-random" in found.origin
    assert all(name in found.origin for name in files)
    assert [len(ids) for ids in found.ids] == [50] * 4
    assert min(map(min, found.ids)) >= 0 and max(map(max, found.ids)) < 251 and len({*found.ids[0]}) > 20
    with pytest.raises(RequestError, match="neither checkpoint has a tokenizer"):
        encode([files, {}], ["a text"], vocab_size=251, limit=50)


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(RequestError, match=r"gives the id \d+, and the models know 0 to 9"):
        encode([{"tokenizer.json": byte_tokenizer()}], None, vocab_size=10, limit=50)


def test_more_tokens_than_fit_are_refused():
    with pytest.raises(RequestError, match=r"2,500 tokens, 2,048 are possible"):
        encode([{"tokenizer.json": byte_tokenizer()}], ["x" * 500] * 5, vocab_size=256, limit=600)


def test_a_file_of_prompts_is_parted_at_its_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("def f():\n\n    return 1\n---\nüber\n --- \n\n---\n----\n")
    assert read_prompts(path) == ["def f():\n\n    return 1", "über", "----"]


@pytest.mark.parametrize(
    ("data", "why"), [(b"", "no prompt"), (b"---\n\n---\n", "no prompt"), (b"\xff", "cannot be read")]
)
def test_a_file_without_prompts_is_refused(tmp_path, data, why):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(RequestError, match=why):
        read_prompts(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_prompts(tmp_path)
