"""Chosen documents as a data set: those of a plain filter, whatever the blocks; its manifest names the parent."""

import tempfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import subset
from data_prep.subset import Change, check_output, commit_subset, copy_documents, document_blocks, open_dataset
from megalemur.data.errors import DamagedDataError, DataError
from megalemur.data.indexed import HEADER, MAGIC, IndexedFile, bin_path, idx_path
from megalemur.data.manifest import manifest_path, read_manifest
from megalemur.data.writer import IndexedWriter
from tests.support.datasets import tokenizer_record, write_dataset

CHANGE = Change("a_tool", {"option": 1}, {"found": 2})


def documents(prefix: Path) -> list[list[int]]:
    file = IndexedFile(prefix)
    return [file.document(number).tolist() for number in range(file.num_documents)]


def foreign(prefix: Path, texts: list[list[int]], dtype: str = "<i4") -> Path:
    """As Megatron-LM would write it: its own dtype, documents without tokens, no manifest."""
    lengths = np.array([len(text) for text in texts], "<i4")
    data = np.array([token for text in texts for token in text], dtype)
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * data.itemsize
    code = {"<i4": 4, "<u2": 8}[dtype]
    bin_path(prefix).write_bytes(data.tobytes())
    header = HEADER.pack(MAGIC, 1, code, len(texts), len(texts) + 1)
    borders = np.arange(len(texts) + 1, dtype="<i8")
    idx_path(prefix).write_bytes(b"".join([header, lengths.tobytes(), pointers.tobytes(), borders.tobytes()]))
    return prefix


def part(prefix: Path, numbers: list, output: Path, vocab_size: int | None = None) -> subset.Copied:
    source = open_dataset(prefix, vocab_size)
    with IndexedWriter(output, vocab_size=source.vocab_size) as writer:
        copied = copy_documents(source.file, map(np.array, numbers), writer, unk_id=source.unk_id)
        commit_subset(writer, source, copied=copied, change=CHANGE)
    return copied


TEXTS = st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.integers(0, 1 << 32), st.integers(1, 30), st.integers(1, 30))
def test_a_part_is_what_a_plain_filter_would_keep(texts, seed, block_tokens, block_documents):
    random = Random(seed)
    chosen = [number for number in range(len(texts)) if random.random() < 0.6]
    blocks, at = [], 0
    while at < len(chosen):
        step = random.randrange(4)
        blocks.append(np.array(chosen[at : at + step], np.int64))
        at += step
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(subset, "_BLOCK_TOKENS", block_tokens)
        patch.setattr(subset, "_BLOCK_DOCUMENTS", block_documents)
        copied = part(foreign(Path(folder) / "a", texts), blocks, Path(folder) / "b", 100)
        expected = [texts[number] for number in chosen if texts[number]]
        assert documents(Path(folder) / "b") == expected
        assert not manifest_path(Path(folder) / "b").exists()
    empty = sum(not texts[number] for number in chosen)
    assert copied == (len(expected), sum(map(len, expected)), empty, 0)


def test_blocks_hold_every_document_once_and_little_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(subset, "_BLOCK_TOKENS", 10)
    texts = [[number] * (number % 7 + 1) for number in range(50)] + [[9] * 25, [8]]
    file = IndexedFile(write_dataset(tmp_path / "a", texts))
    blocks = list(document_blocks(file))
    assert [one.tolist() for block in blocks for one in block.documents()] == texts
    assert [block.first for block in blocks] == np.cumsum([0, *(len(block.lengths) for block in blocks)])[:-1].tolist()
    assert all(block.tokens.size <= 10 or len(block.lengths) == 1 for block in blocks)
    assert [one.tolist() for block in document_blocks(file, 3, 6) for one in block.documents()] == texts[3:6]


def test_neighbours_are_written_together_and_scattered_documents_too(tmp_path, monkeypatch):
    calls = []
    add_many = IndexedWriter.add_many
    monkeypatch.setattr(
        IndexedWriter, "add_many", lambda self, tokens, n: (calls.append(len(n)), add_many(self, tokens, n))
    )
    write_dataset(tmp_path / "a", [[1, 2, 3]] * 1000)
    calls.clear()
    part(tmp_path / "a", [[*range(100)], [*range(100, 300)]], tmp_path / "b")
    part(tmp_path / "a", [[*range(0, 1000, 2)]], tmp_path / "c")
    assert calls == [300, 500]


@pytest.mark.parametrize("numbers", [[[3, 2]], [[1, 1]], [[1, 2], [2]], [[5], [1]], [[-1]]])
def test_numbers_that_do_not_rise_are_refused(tmp_path, numbers):
    write_dataset(tmp_path / "a", [[1]] * 9)
    with pytest.raises(ValueError, match="must rise"):
        part(tmp_path / "a", numbers, tmp_path / "b")
    assert not idx_path(tmp_path / "b").exists()


def test_a_document_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(IndexError):
        part(write_dataset(tmp_path / "a", [[1]] * 9), [[8, 9]], tmp_path / "b")


def test_the_manifest_names_the_parent_and_counts_again(tmp_path):
    write_dataset(tmp_path / "a", [[0, 5], [0, 0, 7], [8]], unknown_tokens=3, control_strings={"<s>": 4})
    part(tmp_path / "a", [[1, 2]], tmp_path / "b")
    parent, manifest = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert (manifest.documents, manifest.tokens, manifest.unknown_tokens) == (2, 4, 2)
    assert (manifest.tokenizer, manifest.prepend_bos, manifest.append_eos) == (parent.tokenizer, False, True)
    assert manifest.digest == IndexedFile(tmp_path / "b").digest and manifest.vouches(tmp_path / "b")
    [source] = manifest.inputs
    assert (source.name, source.bytes, source.documents, source.tokens) == (str(tmp_path / "a"), 12, 2, 4)
    assert manifest.text_bytes == 0  # how many of the parent's it is, is not known
    assert manifest.origin.tool == "a_tool" and manifest.origin.arguments == {"option": 1}
    assert manifest.origin.parents == (parent.digest,)
    assert manifest.control_strings == {"<s>": 4}
    assert manifest.origin.facts == {"found": 2, "control_strings": "counts of the parent: an upper bound"}


def test_a_part_that_is_the_whole_keeps_the_counts(tmp_path):
    write_dataset(tmp_path / "a", [[5], [7]], control_strings={"<s>": 4})
    part(tmp_path / "a", [[0, 1]], tmp_path / "b")
    parent, manifest = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert manifest.text_bytes == parent.text_bytes > 0
    assert manifest.origin.facts == {"found": 2} and manifest.digest == parent.digest


def test_a_part_of_nothing_is_an_empty_data_set(tmp_path):
    assert part(write_dataset(tmp_path / "a", [[5]]), [], tmp_path / "b") == (0, 0, 0, 0)
    assert documents(tmp_path / "b") == [] and read_manifest(tmp_path / "b").documents == 0


def test_the_vocabulary_must_be_known(tmp_path):
    foreign(tmp_path / "a", [[1]])
    with pytest.raises(ValueError, match="--vocab-size"):
        open_dataset(tmp_path / "a")
    assert open_dataset(tmp_path / "a", 77).vocab_size == 77
    write_dataset(tmp_path / "b", [[1]])
    assert open_dataset(tmp_path / "b", 32000).vocab_size == 32000
    with pytest.raises(ValueError, match=r"--vocab-size 5: .* says 32000"):
        open_dataset(tmp_path / "b", 5)


def test_files_that_changed_are_refused(tmp_path):
    write_dataset(tmp_path / "a", [[1, 2, 3]])
    bin_path(tmp_path / "a").write_bytes(b"\1\0\2\0\4\0")
    with pytest.raises(DamagedDataError, match="are not what was written"):
        open_dataset(tmp_path / "a")


def test_ids_of_different_tokenizers_are_not_compared(tmp_path):
    first = open_dataset(write_dataset(tmp_path / "a", [[1]]))
    other = open_dataset(write_dataset(tmp_path / "b", [[1]], tokenizer_record(b"another")))
    larger = open_dataset(foreign(tmp_path / "c", [[1]]), 50000)
    subset.same_tokenizer([first, first])
    for one in (other, larger):
        with pytest.raises(DataError, match="another tokenizer"):
            subset.same_tokenizer([first, one])


def test_outputs_that_are_there_or_are_inputs_are_refused(tmp_path):
    write_dataset(tmp_path / "a", [[1]])
    check_output("--output", tmp_path / "b", [tmp_path / "a"], overwrite=False)
    with pytest.raises(ValueError, match=r"--output .*--overwrite"):
        check_output("--output", tmp_path / "a", [], overwrite=False)
    check_output("--output", tmp_path / "a", [], overwrite=True)
    with pytest.raises(ValueError, match="is an input"):
        check_output("--output", tmp_path / "x" / ".." / "a", [tmp_path / "a"], overwrite=True)
