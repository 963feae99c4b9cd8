"""Data sets one after another, whoever made them; what does not belong together is refused."""

import numpy as np
import pytest
from typer.testing import CliRunner

from data_prep import merge_index
from megalemur.data.indexed import HEADER, IndexedFile
from megalemur.data.manifest import read_manifest
from megalemur.data.writer import IndexedWriter
from tests.support.datasets import refuse_wrong_holes, tokenizer_record, write_dataset, write_holes

A, B = [[5, 6, 2], [7, 2]], [[8, 2], [9, 9, 9, 2]]


def merge(*arguments):
    return CliRunner().invoke(merge_index.app, [str(argument) for argument in arguments])


def documents(prefix):
    file = IndexedFile(prefix)
    return [file.document(k).tolist() for k in range(file.num_documents)]


def test_documents_come_in_the_order_of_the_arguments(tmp_path):
    a, b = write_dataset(tmp_path / "a", A), write_dataset(tmp_path / "b", B)
    assert merge(f"{b}.idx", a, "--output", tmp_path / "c").exit_code == 0
    assert documents(tmp_path / "c") == B + A
    manifest = read_manifest(tmp_path / "c")
    assert manifest.documents == 4 and manifest.inputs[0].documents == 4, "records of one input are added up"
    assert manifest.origin.parents == (IndexedFile(b).digest, IndexedFile(a).digest)


def test_what_does_not_belong_together_is_refused(tmp_path):
    a = write_dataset(tmp_path / "a", A)
    other = write_dataset(tmp_path / "other", B, tokenizer_record(b"another"))
    bos = write_dataset(tmp_path / "bos", B, prepend_bos=True)
    part = write_dataset(tmp_path / "part", B, part=(0, 2), plan="x")
    with IndexedWriter(tmp_path / "bare", vocab_size=32000) as writer:
        writer.add([1])
        writer.commit()
    for wrong, said in (
        (other, "another tokenizer"),
        (bos, "differ in BOS or EOS"),
        (part, "parts of different builds"),
        (tmp_path / "bare", "some have none"),
        (tmp_path / "none", "no manifest" if False else "some have none"),
    ):
        refused = merge(a, wrong, "--output", tmp_path / "c")
        assert refused.exit_code == 1 and said in refused.output, refused.output
    assert "is an input" in merge(a, "--output", a, "--overwrite").output
    assert "is there" in merge(a, "--output", bos).output
    assert not (tmp_path / "c.idx").exists()


def test_data_sets_without_manifests_need_a_vocabulary(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3]), [2, 1])
    builder.add_document(torch.tensor([4]), [1])
    builder.finalize(str(tmp_path / "m.idx"))
    assert "give --vocab-size" in merge(tmp_path / "m", "--output", tmp_path / "c").output
    assert merge(tmp_path / "m", tmp_path / "m", "--output", tmp_path / "c", "--vocab-size", 100).exit_code == 0
    assert documents(tmp_path / "c") == [[1, 2, 3], [4]] * 2 and read_manifest(tmp_path / "c") is None
    assert IndexedFile(tmp_path / "c").dtype == np.uint16


def test_a_damaged_source_is_not_merged(tmp_path):
    a = write_dataset(tmp_path / "a", A)
    data = bytearray((tmp_path / "a.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "a.bin").write_bytes(data)
    refused = merge(a, "--output", tmp_path / "c")
    assert refused.exit_code == 12 and "are not what was written" in refused.output


def test_a_merge_beyond_2_31_bytes(tmp_path):
    """https://github.com/NVIDIA/Megatron-LM/issues/1672: pointers overflowed. Both sources are holes."""
    for name, first_id in (("a", 7), ("b", 10)):
        write_holes(tmp_path / name, 3, 2**28, first_id)
    merged = merge(tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c", "--vocab-size", 32000)
    assert merged.exit_code == 0, merged.output
    refuse_wrong_holes(tmp_path / "c", 6, 2**28, 7)


def test_the_index_of_more_than_2_32_tokens(tmp_path):
    writer = IndexedWriter(tmp_path / "a", vocab_size=32000)
    longest = 2**31 - 1
    with writer:
        for _ in range(5):
            writer._count(np.array([longest], np.int32), longest)
        index = b"".join(bytes(part) for part in writer._index_parts(8))
    pointers = np.frombuffer(index, "<i8", 5, HEADER.size + 20)
    assert pointers.tolist() == [2 * k * longest for k in range(5)] and pointers[-1] > 2**33


@pytest.mark.parametrize("seed", [0, 7])
def test_a_merge_can_be_shuffled(tmp_path, seed):
    many = [[k + 3] * (k % 5 + 1) + [2] for k in range(300)]
    a, b = write_dataset(tmp_path / "a", many[:100]), write_dataset(tmp_path / "b", many[100:])
    assert merge(a, b, "--output", tmp_path / "c", "--shuffle", seed).exit_code == 0
    found = documents(tmp_path / "c")
    assert found != many and sorted(found) == sorted(many)
    assert sorted(path.name for path in tmp_path.glob("*c.*")) == ["c.bin", "c.idx", "c.manifest.json"]
