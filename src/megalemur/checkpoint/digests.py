"""Digests of files by chunk: made while a file is written, compared while it is read. Free of torch."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from megalemur.checkpoint.errors import DamagedCheckpoint

CHUNK_BYTES = 32 << 20
"""Bytes that share a digest: how closely damage is located, and what a reader holds before it may use a byte of it."""


class FileEntry(NamedTuple):
    """Size in bytes and xxh3_128 (hexadecimal) of each CHUNK_BYTES of a file; the last chunk may be shorter."""

    size: int
    chunks: tuple[str, ...]

    @property
    def root(self) -> str:
        """One digest for the file: xxh3_128 of its chunks' digests, as bytes."""
        return xxhash.xxh3_128_hexdigest(b"".join(map(bytes.fromhex, self.chunks)))

    def span(self, chunk: int) -> tuple[int, int]:
        """First byte of a chunk, and the byte behind its last."""
        return chunk * CHUNK_BYTES, min((chunk + 1) * CHUNK_BYTES, self.size)


class ChunkDigester:
    """Takes a file's bytes in any portions."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._open = xxhash.xxh3_128()
        self._filled = self._size = 0

    def update(self, data: bytes | memoryview) -> None:
        """Bytes that follow those of before."""
        view = memoryview(data)
        self._size += len(view)
        while view:
            part = view[: CHUNK_BYTES - self._filled]
            self._open.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == CHUNK_BYTES:
                self._done.append(self._open.hexdigest())
                self._open.reset()
                self._filled = 0

    def entry(self) -> FileEntry:
        """Of everything so far."""
        return FileEntry(self._size, tuple(self._done + [self._open.hexdigest()] * (self._filled > 0)))


def entry_of(data: bytes) -> FileEntry:
    """Of a small file."""
    digester = ChunkDigester()
    digester.update(data)
    return digester.entry()


def refuse_other_bytes(path: Path, entry: FileEntry, chunk: int, data: bytes | bytearray | memoryview) -> None:
    """Compare a chunk that was read.

    Raises:
        DamagedCheckpoint: names the file and the range of bytes.
    """
    start, stop = entry.span(chunk)
    if len(data) != stop - start:
        raise DamagedCheckpoint(path, f"ends at byte {start + len(data)} instead of {entry.size}")
    if xxhash.xxh3_128_hexdigest(data) != entry.chunks[chunk]:
        raise DamagedCheckpoint(path, f"bytes [{start}, {stop}) differ from those that were written (xxh3_128)")


def verified_chunks(path: Path, entry: FileEntry) -> Iterator[memoryview]:
    """The chunks of a file, each compared before it is handed out; one buffer is used again and again.

    Raises:
        DamagedCheckpoint: as `refuse_other_bytes`, or the file cannot be read.
    """
    buffer = memoryview(bytearray(min(CHUNK_BYTES, entry.size)))
    try:
        with path.open("rb", buffering=0) as file:
            for chunk in range(len(entry.chunks)):
                data = buffer[: read_at(file.fileno(), buffer, *entry.span(chunk))]
                refuse_other_bytes(path, entry, chunk, data)
                yield data
    except OSError as error:
        raise DamagedCheckpoint(path, f"cannot be read: {error.strerror}") from error


def read_at(file: int, buffer: memoryview, start: int, stop: int) -> int:
    """Fill the buffer with bytes [start, stop) of an open file; how many there were."""
    done = 0
    while done < stop - start and (count := os.preadv(file, [buffer[done : stop - start]], start + done)):
        done += count
    return done
