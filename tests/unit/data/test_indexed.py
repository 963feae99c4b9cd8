"""Files of ours and of megatron-core read alike; damage is refused with the file's name."""

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalemur.data.errors import DamagedDataError, DataError, MissingDataError
from megalemur.data.indexed import HEADER, IndexedFile, optimal_dtype
from megalemur.data.manifest import read_manifest
from megalemur.data.writer import IndexedWriter

DOCUMENTS = [[5, 6, 7, 2], [2], [9] * 10 + [2], [31999, 0, 2]]


def write(prefix: Path, documents=DOCUMENTS, vocab_size=32000) -> Path:
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        for document in documents:
            writer.add(document)
        writer.commit()
    return prefix


def flip(path: Path, at: int, value: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    path.write_bytes(raw)


def test_tokens_and_borders_come_back_as_one_stream(tmp_path):
    file = IndexedFile(write(tmp_path / "a"))
    assert file.num_documents == 4 and file.num_tokens == 19 and file.dtype == np.uint16
    assert file.tokens(0, 19).tolist() == [token for document in DOCUMENTS for token in document]
    assert file.tokens(3, 6).tolist() == [2, 2, 9]
    assert file.document_starts(0, 19).tolist() == [0, 4, 5, 16]
    assert file.document_starts(4, 16).tolist() == [4, 5]
    assert file.document_starts(6, 16).tolist() == []


@pytest.mark.parametrize("start, stop", [(-1, 3), (0, 20), (5, 4)])
def test_a_range_outside_the_stream_is_an_error(tmp_path, start, stop):
    with pytest.raises(IndexError):
        IndexedFile(write(tmp_path / "a")).tokens(start, stop)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40), data=st.data())
def test_document_starts_equal_a_plain_search(tmp_path_factory, lengths, data):
    prefix = write(tmp_path_factory.mktemp("d") / "a", [[7] * n for n in lengths])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    low = data.draw(st.integers(0, sum(lengths)))
    high = data.draw(st.integers(low, sum(lengths)))
    found = IndexedFile(prefix).document_starts(low, high)
    assert found.tolist() == [p for p in starts.tolist() if low <= p < high]


@pytest.mark.parametrize("vocab_size", [32000, 65499, 65500, 128256])
def test_megatron_core_chooses_the_same_dtype(vocab_size):
    from megatron.core.datasets.indexed_dataset import DType

    assert optimal_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


@pytest.mark.parametrize("vocab_size", [32000, 128256])
@pytest.mark.parametrize("mapped", [True, False])
def test_megatron_core_reads_our_files(tmp_path, vocab_size, mapped):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    # the object is kept: its arrays are views of a mapping that it closes when it dies
    dataset = IndexedDataset(str(write(tmp_path / "a", vocab_size=vocab_size)), mmap=mapped)
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint8])
def test_we_read_files_of_megatron_core_with_documents_of_several_sequences(tmp_path, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [3, 2])
    builder.add_document(torch.tensor([6, 7]), [2])
    builder.finalize(str(tmp_path / "a.idx"))
    file = IndexedFile(tmp_path / "a")
    assert file.tokens(0, 7).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert file.document_starts(0, 7).tolist() == [0, 5] and file.num_documents == 2


def test_our_index_is_byte_for_byte_megatron_core_s(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "a.idx"))
    write(tmp_path / "b")
    for ending in ("idx", "bin"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


@pytest.mark.parametrize("missing", ["bin", "idx"])
def test_a_missing_file_is_named(tmp_path, missing):
    prefix = write(tmp_path / "a")
    (tmp_path / f"a.{missing}").unlink()
    with pytest.raises(MissingDataError, match=rf"a\.{missing}: no such file.*build it again"):
        IndexedFile(prefix)


SEQUENCES = len(DOCUMENTS)
LENGTHS, POINTERS = HEADER.size, HEADER.size + 4 * SEQUENCES
BORDERS = POINTERS + 8 * SEQUENCES
DAMAGE = {
    "magic": (0, b"X", "not an MMIDIDX index"),
    "version": (9, struct.pack("<Q", 2), "version 2"),
    "unknown dtype": (17, b"\x09", "dtype code 9 is unknown"),
    "float dtype": (17, b"\x07", "float"),
    "wider dtype": (17, b"\x04", "sequence 1 points"),
    "number of sequences": (18, struct.pack("<Q", 5), "truncated or changed"),
    "endless sequences": (18, struct.pack("<Q", 2**63), "truncated or changed"),
    "number of documents": (26, struct.pack("<Q", 0), "truncated or changed"),
    "negative length": (LENGTHS + 4, struct.pack("<i", -1), "sequence 1 has a negative length"),
    "length": (LENGTHS, struct.pack("<i", 3), "sequence 1 points"),
    "last length": (LENGTHS + 12, struct.pack("<i", 4), "but its index counts 40"),
    "pointer": (POINTERS + 16, struct.pack("<q", 11), "sequence 2 points at byte 11"),
    "first document": (BORDERS, struct.pack("<q", 1), "document list"),
    "falling documents": (BORDERS + 8, struct.pack("<q", 3), "document list"),
    "last document": (BORDERS + 32, struct.pack("<q", 5), "document list"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_index_is_refused(tmp_path, kind):
    at, value, message = DAMAGE[kind]
    prefix = write(tmp_path / "a")
    flip(tmp_path / "a.idx", at, value)
    with pytest.raises(DamagedDataError, match=message) as refused:
        IndexedFile(prefix)
    assert str(tmp_path / "a.") in str(refused.value)


@settings(max_examples=60, deadline=None)
@given(bit=st.integers(0, 8 * (BORDERS + 8 * (SEQUENCES + 1)) - 1))
def test_any_flipped_bit_of_the_index_is_refused_or_changes_the_digest(tmp_path_factory, bit):
    prefix = write(tmp_path_factory.mktemp("d") / "a")
    digest = IndexedFile(prefix).digest
    path = Path(f"{prefix}.idx")
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    with suppress(DataError):
        assert IndexedFile(prefix).digest != digest


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("keep", [0, 20, -1])
def test_a_truncated_file_is_refused(tmp_path, ending, keep):
    prefix = write(tmp_path / "a")
    path = tmp_path / f"a.{ending}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedDataError, match=rf"a\.{ending}"):
        IndexedFile(prefix)


def test_an_index_with_multimodal_modes_is_refused(tmp_path):
    prefix = write(tmp_path / "a")
    with (tmp_path / "a.idx").open("ab") as stream:
        stream.write(b"\0" * SEQUENCES)
    with pytest.raises(DamagedDataError, match="multimodal"):
        IndexedFile(prefix)


def test_the_digest_follows_the_content_and_not_the_path(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    c = write(tmp_path / "c", [[5, 6, 8, 2], *DOCUMENTS[1:]])
    d = write(tmp_path / "d", [[5, 6, 7, 2, 2], *DOCUMENTS[2:]])
    digests = [IndexedFile(prefix).digest for prefix in (a, b, c, d)]
    assert digests[0] == digests[1] and len(set(digests)) == 3


@pytest.mark.parametrize(
    "document, message",
    [
        ([1, 32000], "id 32000, outside the vocabulary of 32000"),
        ([1, -1], "id -1"),
        ([70000], "id 70000"),
        ([], "has no tokens"),
        ([1.5], "row of integers"),
        ([[1], [2]], "row of integers"),
    ],
)
def test_the_writer_refuses_what_the_file_cannot_hold_and_leaves_nothing(tmp_path, document, message):
    with (
        pytest.raises(ValueError, match=rf"document 1.*{message}"),
        IndexedWriter(tmp_path / "a", vocab_size=32000) as writer,
    ):
        writer.add([1])
        writer.add(document)
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_stays_whole_until_its_successor_is_committed(tmp_path):
    prefix = write(tmp_path / "a")
    with pytest.raises(RuntimeError), IndexedWriter(prefix, vocab_size=10) as writer:
        writer.add([1, 2, 3])
        raise RuntimeError("out of text")
    assert IndexedFile(prefix).num_tokens == 19
    write(prefix, [[1, 2, 3]], vocab_size=10)
    assert IndexedFile(prefix).num_tokens == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_pointers_beyond_32_bits_are_read(tmp_path):
    """40 B tokens and more: https://github.com/NVIDIA/Megatron-LM/issues/1672. The .bin is sparse."""
    lengths = np.full(50, 2**31 - 8, np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))[:-1]]) * 2
    with (tmp_path / "a.idx").open("wb") as stream:
        stream.write(HEADER.pack(b"MMIDIDX\0\0", 1, 8, 50, 51))
        for column in (lengths, pointers, np.arange(51)):
            stream.write(column.tobytes())
    total = int(lengths.astype(np.int64).sum())
    with (tmp_path / "a.bin").open("wb") as stream:
        stream.truncate(2 * total)
    file = IndexedFile(tmp_path / "a")
    assert file.num_tokens == total > 100e9
    assert file.document_starts(total - int(lengths[0]) - 1, total).tolist() == [total - int(lengths[0])]
    assert file.tokens(total - 3, total).tolist() == [0, 0, 0] and len(file.digest) == 32


def test_a_data_set_without_manifest_has_none_and_a_damaged_one_is_refused(tmp_path):
    prefix = write(tmp_path / "a")
    assert read_manifest(prefix) is None
    (tmp_path / "a.manifest.json").write_text('{"format": 2}')
    with pytest.raises(DamagedDataError, match=r"a\.manifest\.json"):
        read_manifest(prefix)
