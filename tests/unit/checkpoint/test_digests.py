"""Digests by chunk: independent of the portions in which bytes arrive, and each names its own range."""

from itertools import pairwise
from pathlib import Path

import pytest
import xxhash

from megalemur.checkpoint.digests import CHUNK_BYTES, ChunkDigester, FileEntry, entry_of, verified_chunks
from megalemur.checkpoint.errors import DamagedCheckpoint

SIZE = 2 * CHUNK_BYTES + 1000
SPANS = [(0, CHUNK_BYTES), (CHUNK_BYTES, 2 * CHUNK_BYTES), (2 * CHUNK_BYTES, SIZE)]


@pytest.fixture(scope="module")
def data() -> bytes:
    return bytes(range(251)) * (SIZE // 251) + bytes(SIZE % 251)


@pytest.mark.parametrize(
    "cuts",
    [
        [],
        [1],
        [CHUNK_BYTES],
        [CHUNK_BYTES - 1, CHUNK_BYTES + 1],
        [7, 7, 2 * CHUNK_BYTES],
        list(range(0, SIZE, 999_983)),
    ],
)
def test_the_portions_do_not_matter(data: bytes, cuts: list[int]) -> None:
    digester = ChunkDigester()
    edges = [0, *cuts, SIZE]
    for first, last in pairwise(edges):
        digester.update(memoryview(data)[first:last])
    assert digester.entry() == FileEntry(SIZE, tuple(xxhash.xxh3_128_hexdigest(data[a:b]) for a, b in SPANS))


def test_an_empty_file_has_no_chunk() -> None:
    assert entry_of(b"") == FileEntry(0, ())
    assert entry_of(b"").root != entry_of(b"x").root


def test_damage_is_located(tmp_path: Path, data: bytes) -> None:
    path, entry = tmp_path / "f", entry_of(data)
    path.write_bytes(data)
    assert b"".join(map(bytes, verified_chunks(path, entry))) == data
    with path.open("r+b") as file:
        file.seek(CHUNK_BYTES + 5)
        file.write(bytes([data[CHUNK_BYTES + 5] ^ 4]))
    chunks = verified_chunks(path, entry)
    next(chunks)
    with pytest.raises(DamagedCheckpoint, match=rf"bytes \[{CHUNK_BYTES}, {2 * CHUNK_BYTES}\) differ"):
        next(chunks)


def test_a_file_cut_short_while_it_is_read_is_noticed(tmp_path: Path, data: bytes) -> None:
    path, entry = tmp_path / "f", entry_of(data)
    path.write_bytes(data[: CHUNK_BYTES + 10])
    with pytest.raises(DamagedCheckpoint, match=f"ends at byte {CHUNK_BYTES + 10} instead of {SIZE}"):
        list(verified_chunks(path, entry))
