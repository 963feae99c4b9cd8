"""Llama 3's tokenizer.model becomes a tokenizer that gives the ids that tiktoken gives."""

import base64
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from checkpoints_tools.conversion import Request, convert
from checkpoints_tools.errors import UnfitSource
from checkpoints_tools.formats import open_any
from checkpoints_tools.llama3_tokenizer import hugging_face_files, recognises
from tests.support.meta_release import write_meta
from tests.support.tiny import write_llama

# Meta's own tokenizer.py: how text is cut, and the first special tokens of each release
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OF_3 = (
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *(f"<|reserved_special_token_{n}|>" for n in range(4)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{n}|>" for n in range(5, 251)),
)
OF_3_1 = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{n}|>" for n in range(3, 248))),
)
TEXTS = [
    "Hello, world! I'LL see what they've said; don't you?",
    "def f(x):\r\n\treturn x ** 2  # 12345678 and 3.14\n\n\n    pass   ",
    "Ünïcödé — 你好，世界 🦙🦙 \u200d naïve ﬁ",
    "   leading, trailing   \n \n",
    "<|begin_of_text|> as text is cut as text, <|eot_id|>",
    "aaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbabababababababa",
    "",
]
RELEASES = pytest.mark.parametrize(("special", "scaled"), [(OF_3, False), (OF_3_1, True)], ids=["3", "3.1"])


def trained_ranks(count: int) -> dict[bytes, int]:
    """Tokens by rank, learned from this repository's own documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=count, initial_alphabet=alphabet, show_progress=False)
    root = Path(__file__).parents[3]
    tokenizer.train_from_iterator([file.read_text() for file in sorted((root / "docs").glob("*.md"))] + TEXTS, trainer)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    bytes_of = {chr(byte): byte for byte in printable}
    bytes_of |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in printable)}
    found = tokenizer.get_vocab()
    return {bytes(bytes_of[letter] for letter in token): rank for token, rank in found.items()}


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    found = trained_ranks(2000)
    assert sorted(found.values()) == list(range(2000)) and max(map(len, found)) > 8
    return found


def file_of(ranks: dict[bytes, int]) -> bytes:
    lines = sorted(ranks.items(), key=lambda pair: pair[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in lines)


@RELEASES
def test_a_converted_release_has_the_ids_of_tiktoken(tmp_path, ranks, special, scaled):
    assert len(special) == 256
    hf = write_llama(tmp_path / "hf", num_layers=1, vocab_size=len(ranks) + 256)
    extra = {"use_scaled_rope": True} if scaled else {}
    meta = write_meta(tmp_path / "meta", hf, parts=1, embedding=0, rope_theta=500000.0, **extra)
    (meta / "tokenizer.model").write_bytes(file_of(ranks))
    source = open_any(meta)
    convert(source, source, Request(tmp_path / "out", "hf"))
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    ids = {token: len(ranks) + n for n, token in enumerate(special)}
    wanted = tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=ids)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(found) == len(ranks) + 256
    assert {token: found.convert_tokens_to_ids(token) for token in special} == ids
    assert (found.bos_token_id, found.eos_token_id) == (len(ranks), len(ranks) + 1)
    for text in TEXTS:
        plain = found(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert plain == wanted.encode(text, disallowed_special=()), text
        assert found(text).input_ids == [len(ranks), *wanted.encode(text, allowed_special="all")], text
        assert found.decode(plain) == text


def test_another_order_of_ranks_gives_other_ids(ranks):
    # the test before this one could fail
    tokens = sorted(ranks, key=ranks.__getitem__)
    other = {token: rank for rank, token in enumerate([*tokens[:256], *reversed(tokens[256:])])}
    encodings = [tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=r, special_tokens={}) for r in (ranks, other)]
    files = hugging_face_files(file_of(other), Path("x"), release_3_1=False, rows=2256, context=8192)
    found = Tokenizer.from_str(files["tokenizer.json"].decode()).encode(TEXTS[0], add_special_tokens=False).ids
    assert found == encodings[1].encode(TEXTS[0]) != encodings[0].encode(TEXTS[0])


def test_a_sentencepiece_model_is_none(ranks):
    assert recognises(file_of(ranks)) and not recognises(b"\n\x0e\n\x05<unk>\x15\x00\x00") and not recognises(b"")


BAD = {
    "a rank twice": lambda data: data.replace(b" 300\n", b" 299\n"),
    "a rank too much": lambda data: data.replace(b" 1999\n", b" 2001\n"),
    "a token twice": lambda data: (
        data[: data.rindex(b"\n", 0, -1) + 1] + data.splitlines()[299].split()[0] + b" 1999\n"
    ),
    "no base64": lambda data: data.replace(data.splitlines()[700].split()[0] + b" 700", b"A 700"),
    "an empty line": lambda data: data + b"\n",
    "a token of a megabyte": lambda data: data + base64.b64encode(b"x" * 1_000_000) + b" 2000\n",
    "another vocabulary": lambda data: data + base64.b64encode(b"never there") + b" 2000\n",
    "no token for a byte": lambda data: data.replace(
        data.splitlines()[7].split()[0] + b" 7\n", base64.b64encode(b"never there") + b" 7\n"
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_tokenizer_of_this_model_is_named(ranks, name):
    data = BAD[name](file_of(ranks))
    assert recognises(data) and data != file_of(ranks)
    with pytest.raises(UnfitSource, match=r"release/tokenizer\.model: (line|has)"):
        hugging_face_files(data, Path("release/tokenizer.model"), release_3_1=False, rows=2256, context=8192)
