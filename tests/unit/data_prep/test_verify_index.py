"""Damage of any byte is found and located; what is well is vouched for again."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_prep import verify, verify_index
from megalemur.data import manifest as manifest_module
from megalemur.data.manifest import FileDigest, read_manifest
from tests.support.datasets import manifest_of, tokenizer_record, write_dataset

DOCUMENTS = [[5, 6, 7, 2], [9, 2], [10 + k for k in range(40)] + [2], [31999, 2]] * 20


def check(*arguments):
    return CliRunner().invoke(verify_index.app, [str(argument) for argument in arguments])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(FileDigest.__init__, "__defaults__", (64,))


def test_a_whole_data_set_is_said_to_be_whole(tmp_path, small_chunks):
    prefix = write_dataset(tmp_path / "a", DOCUMENTS)
    assert len(read_manifest(prefix).files["bin"].chunks) == 31
    done = check(prefix)
    assert done.exit_code == 0 and "80 documents, 980 tokens: digests, ids and ends agree" in done.output


@settings(max_examples=60, deadline=None)
@given(byte=st.integers(0, 2 * 980 - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_tokens_is_found_and_located(tmp_path_factory, byte, bit):
    before = FileDigest.__init__.__defaults__
    FileDigest.__init__.__defaults__ = (64,)
    try:
        prefix = write_dataset(tmp_path_factory.mktemp("v") / "a", DOCUMENTS)
    finally:
        FileDigest.__init__.__defaults__ = before
    path = Path(f"{prefix}.bin")
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)
    problems = verify.verify(prefix).problems
    first = byte // 64 * 64
    assert f"bytes [{first}, {min(first + 64, len(data))}) are not what was written" in problems[0]
    starts = np.cumsum([0, *map(len, DOCUMENTS)])
    document = int(np.searchsorted(starts, byte // 2, side="right")) - 1
    low, high = problems[0].rsplit("documents ", 1)[1].split(" to ")
    assert int(low) <= document <= int(high)


def test_neighbouring_chunks_are_one_range_and_others_are_not(tmp_path, small_chunks):
    prefix = write_dataset(tmp_path / "a", DOCUMENTS)
    path = Path(f"{prefix}.bin")
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    data[300:400] = bytes(100)
    path.write_bytes(data)
    done = check(prefix)
    assert done.exit_code == 12
    assert "bytes [0, 64)" in done.output and "bytes [256, 448)" in done.output


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_truncated_files_are_found(tmp_path, ending):
    prefix = write_dataset(tmp_path / "a", DOCUMENTS)
    os.truncate(f"{prefix}.{ending}", 100)
    done = check(prefix)
    assert done.exit_code == 12 and f"a.{ending}" in done.output and "Traceback" not in done.output


def test_a_flipped_bit_of_the_index_is_named_even_where_the_index_stays_well_formed(tmp_path):
    prefix = write_dataset(tmp_path / "a", DOCUMENTS)
    path = Path(f"{prefix}.idx")
    data = bytearray(path.read_bytes())
    data[34 + 12 * 80 + 8] ^= 2  # the first document would end with the third sequence
    path.write_bytes(data)
    done = check(prefix)
    assert done.exit_code == 12 and "a.idx: bytes [0," in done.output


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([[5, 2], [6, 7]], "document 1 does not end with EOS (id 2)"),
        ([[5, 2, 2], [6, 2]], "EOS (id 2) stands 3 times in 2 documents"),
    ],
)
def test_documents_must_end_as_the_manifest_says(tmp_path, documents, said):
    prefix = write_dataset(tmp_path / "a", documents)
    done = check(prefix)
    assert done.exit_code == 12 and said in done.output
    assert check(write_dataset(tmp_path / "b", documents, append_eos=False)).exit_code == 0


def test_ids_must_be_below_the_vocabulary(tmp_path):
    prefix = write_dataset(tmp_path / "a", DOCUMENTS)
    done = check(prefix, "--vocab-size", 31999)
    assert done.exit_code == 12 and "id 31999 behind token 0 is outside the vocabulary of 31999" in done.output
    Path(f"{prefix}.manifest.json").unlink()
    assert check(prefix, "--vocab-size", 31999).exit_code == 12
    done = check(prefix)
    assert done.exit_code == 0 and "no manifest: structure and ids alone" in done.output


def test_a_copy_is_not_vouched_for_until_it_is_verified(tmp_path):
    prefix = write_dataset(tmp_path / "a", DOCUMENTS)
    os.utime(f"{prefix}.bin", ns=(1, 1))
    assert not read_manifest(prefix).vouches(prefix)
    assert check(prefix).exit_code == 0
    assert read_manifest(prefix).vouches(prefix)


def test_damage_is_not_vouched_for(tmp_path):
    prefix = write_dataset(tmp_path / "a", DOCUMENTS)
    path = Path(f"{prefix}.bin")
    data = path.read_bytes()
    path.write_bytes(bytes(2) + data[2:])
    before = Path(f"{prefix}.manifest.json").read_bytes()
    assert check(prefix).exit_code == 12
    assert Path(f"{prefix}.manifest.json").read_bytes() == before


def test_a_manifest_of_another_data_set_is_told(tmp_path):
    from megalemur.data.writer import IndexedWriter

    with IndexedWriter(tmp_path / "a", vocab_size=32000) as writer:
        writer.add([5, 2])
        writer.commit(lambda written: manifest_of(written, tokenizer_record(), tokens=3, documents=1))
    done = check(tmp_path / "a")
    assert done.exit_code == 12 and "tokens: 3 there, 2 in the files" in done.output
    assert manifest_module.CHUNK_BYTES == 16 << 20
