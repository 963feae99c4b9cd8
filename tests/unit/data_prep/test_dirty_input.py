"""What real corpora hold: links, odd names, damaged tables, endless lines. Nothing is lost without a word."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_prep import feed
from data_prep.documents import read_unit
from data_prep.engine import fast_engine
from data_prep.inputs import Source, find_inputs
from data_prep.plan import Unit, make_units
from data_prep.tokenizer import load_tokenizer
from tests.unit.data_prep.test_inputs import TEXTS, build, lines, small_units  # noqa: F401 - a fixture


def texts_of(inputs: list[Source], unit: Unit) -> tuple[list[str], list[str]]:
    batches = list(read_unit(unit, inputs, "text"))
    return [text for batch in batches for text in batch.texts], [bad.reason for batch in batches for bad in batch.bad]


def test_directories_are_read_through_links_and_loops_end(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere" / "deep"
    corpus.mkdir()
    elsewhere.mkdir(parents=True)
    (corpus / "a.txt").write_text("a")
    (elsewhere / "b.txt").write_text("b")
    (elsewhere / ".hidden").write_text("no")
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (corpus / "loop").symlink_to(corpus)
    found = [source.name for source in find_inputs([str(corpus)])]
    assert found == [str(corpus / "a.txt"), str(corpus / "linked" / "deep" / "b.txt")]


def test_a_link_to_nothing_is_a_bad_document(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(lines(TEXTS[:3]))
    (tmp_path / "in" / "b.jsonl").symlink_to(tmp_path / "gone")
    said = build(tmp_path / "in", tmp_path / "a", "--engine", "reference", code=21)
    assert "b.jsonl" in said.replace("\n", "") and "No such file" in said.replace("\n", " ")


def test_a_directory_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match=r"secret cannot be read \(Permission denied\)"):
        find_inputs([str(tmp_path)])


def test_names(tmp_path):
    (tmp_path / "A.JSONL").write_bytes(b'{"text": "x"}\n')
    (tmp_path / "b [1]\n*.jsonl").write_bytes(b'{"text": "x"}\n')
    assert [source.format for source in find_inputs([str(tmp_path)])] == ["jsonl", "jsonl"]
    with pytest.raises(ValueError, match="no such file"):
        find_inputs([""])
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("x")
    with pytest.raises(ValueError, match=r"\\udcff\.txt' is not UTF-8"):
        find_inputs([str(tmp_path)])


def test_an_output_in_a_directory_of_input_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:3]))
    assert "would become input" in build(tmp_path, tmp_path / "out" / "a", code=1).replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_large_parquet_file_without_its_end_is_a_bad_document(tmp_path, small_units):  # noqa: F811
    (tmp_path / "a.parquet").write_bytes(os.urandom(5000))
    assert "a.parquet: no Parquet file with texts" in build(tmp_path / "a.parquet", tmp_path / "a", code=21)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_rows_before_the_damage_of_a_table_are_read(tmp_path, form):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path, table = tmp_path / f"a.{form}", arrow.table({"text": TEXTS})
    if form == "parquet":
        parquet.write_table(table, path, row_group_size=100, compression="zstd")
        facts = parquet.ParquetFile(path).metadata.row_group(2).column(0)
        start = min(facts.data_page_offset, facts.dictionary_page_offset or facts.data_page_offset)
        data = bytearray(path.read_bytes())
        data[start : start + facts.total_compressed_size] = bytes(facts.total_compressed_size)
        path.write_bytes(data)
    else:
        with arrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
        path.write_bytes(path.read_bytes()[:-800])
    inputs = find_inputs([str(path)])
    texts, bad = texts_of(inputs, make_units(inputs)[0])
    assert len(bad) == 1 and texts == TEXTS[: len(texts)] and len(texts) >= 100


def test_a_zstandard_file_with_a_long_window_is_read(tmp_path):
    import zstandard

    wide = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(b'{"text": "x"}\n') + packer.flush())
    inputs = find_inputs([str(tmp_path / "a.jsonl.zst")])
    assert texts_of(inputs, make_units(inputs)[0]) == (["x"], [])


class Counting(io.BytesIO):
    """Counts what is read of it."""

    read_bytes = 0

    def readline(self, size=-1):
        line = super().readline(size)
        Counting.read_bytes += len(line)
        return line


def test_ranges_inside_one_endless_line_do_not_read_it_to_its_end(monkeypatch):
    data = b'{"text": "' + b"x" * 100_000 + b'"}\n{"text": "y"}\n'
    source = Source("a.jsonl", "jsonl", None, len(data), "1")
    monkeypatch.setattr(Source, "open", lambda _: Counting(data))
    found = []
    for start in range(0, len(data), 1000):
        unit = Unit("range", 0, 0, start, min(start + 1000, len(data)), 1000)
        found += texts_of([source], unit)[0]
    assert found == ["x" * 100_000, "y"] and Counting.read_bytes < 2 * len(data)


class Searched(bytearray):
    """Counts what is searched of it."""

    searched_bytes = 0

    def find(self, what, start=0):
        end = super().find(what, start)
        Searched.searched_bytes += (end if end >= 0 else len(self)) - start
        return end


def test_a_stream_of_one_endless_line_is_searched_once(tmp_path, monkeypatch):
    size = 1 << 20
    (tmp_path / "a.jsonl").write_bytes(b"x" * size + b"\nlast")
    monkeypatch.setattr(feed, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(feed, "_some", lambda stream: stream.read(1 << 13))
    monkeypatch.setattr(feed, "bytearray", Searched, raising=False)
    [source] = find_inputs([str(tmp_path / "a.jsonl")])
    chunks = list(feed.chunks_of(source))
    assert [len(chunk.data) for chunk in chunks] == [size + 1, 4]
    assert size // 2 < Searched.searched_bytes < 2 * size


def test_user_defined_control_pieces_are_not_found_in_text(tmp_path):
    corpus = ["the lemur lives on madagascar and eats leaves <|im_start|>"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(tmp_path / "t"),
        vocab_size=60,
        model_type="bpe",
        user_defined_symbols=["<|im_start|>", "\t"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert tokenizer.control["<|im_start|>"] == 3 and tokenizer.piece(4) == "\t"
    ids = tokenizer.encode(["lemur <|im_start|>\tlemur"]).ids
    assert 3 not in ids and 4 in ids, "other user-defined pieces are part of the vocabulary"
    assert fast_engine(tmp_path / "t.model") is None and np.all(ids < tokenizer.record.vocab_size)
