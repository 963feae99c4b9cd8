"""Digests of files by chunk: made while a file is written, compared while it is read. Free of torch."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from megalemur.checkpoint.errors import DamagedCheckpoint, UnreadableCheckpoint
from megalemur.config.plain_files import open_plain

CHUNK_BYTES = 32 << 20
"""Bytes that share a digest: how closely damage is located, and what a reader holds before it may use a byte of it."""

_STEP_BYTES = 1 << 20


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


def verified_chunks(path: Path, entry: FileEntry) -> Iterator[memoryview]:
    """The chunks of a file, each compared before it is handed out; one buffer is used again and again.

    Raises:
        DamagedCheckpoint: as `read_verified`.
        UnreadableCheckpoint: the file cannot be opened or read.
    """
    buffer = memoryview(bytearray(min(CHUNK_BYTES, entry.size)))
    try:
        file = open_plain(path, follow_links=False)
        try:
            for chunk in range(len(entry.chunks)):
                start, stop = entry.span(chunk)
                read_verified(file, path, entry, chunk, buffer[: stop - start])
                yield buffer[: stop - start]
        finally:
            os.close(file)
    except OSError as error:
        raise UnreadableCheckpoint(path, f"cannot be read: {error.strerror}") from error


def read_verified(file: int, path: Path, entry: FileEntry, chunk: int, buffer: memoryview) -> None:
    """Read a chunk of an open file into a buffer of its size, and compare it.

    Raises:
        DamagedCheckpoint: names the file and the range of bytes.
    """
    start, stop = entry.span(chunk)
    state = xxhash.xxh3_128()
    done = 0
    # in steps that stay in the cache between the read and the digest: that halves what the digest costs
    while count := read_at(file, buffer[done:], start + done, min(start + done + _STEP_BYTES, stop)):
        state.update(buffer[done : done + count])
        done += count
    _compare(path, entry, chunk, done, state.hexdigest())


def refuse_other_bytes(path: Path, entry: FileEntry, chunk: int, data: bytes | bytearray | memoryview) -> None:
    """Compare a chunk that was read some other way.

    Raises:
        DamagedCheckpoint: names the file and the range of bytes.
    """
    _compare(path, entry, chunk, len(data), xxhash.xxh3_128_hexdigest(data))


def _compare(path: Path, entry: FileEntry, chunk: int, found: int, digest: str) -> None:
    start, stop = entry.span(chunk)
    if found != stop - start:
        raise DamagedCheckpoint(path, f"ends at byte {start + found} instead of {entry.size}")
    if digest != entry.chunks[chunk]:
        raise DamagedCheckpoint(path, f"bytes [{start}, {stop}) differ from those that were written (xxh3_128)")


def read_at(file: int, buffer: memoryview, start: int, stop: int) -> int:
    """Fill the buffer with bytes [start, stop) of an open file; how many there were."""
    done = 0
    while done < stop - start and (count := os.preadv(file, [buffer[done : stop - start]], start + done)):
        done += count
    return done
