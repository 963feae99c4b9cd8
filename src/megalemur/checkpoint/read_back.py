"""Reads a checkpoint back from the disk after its commit, every byte once, shared out over the ranks."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from megalemur.checkpoint.digests import CHUNK_BYTES, FileEntry, read_at, refuse_other_bytes
from megalemur.checkpoint.directory import open_manifest
from megalemur.checkpoint.errors import CheckpointError, DamagedCheckpoint
from megalemur.checkpoint.exchange import Attempt, Peers
from megalemur.checkpoint.manifest import MANIFEST, Manifest
from megalemur.checkpoint.retention import set_aside


class Share(NamedTuple):
    """Neighbouring chunks [first, stop) of a file."""

    file: str
    first: int
    stop: int


def shares(files: Mapping[str, FileEntry], rank: int, ranks: int) -> list[Share]:
    """What one of several ranks reads: runs of chunks of about equal bytes; together every chunk once.

    A rank reads what lies half a world away in the list, which another machine has written where there are several:
    the pages that it wrote itself may still be in memory.
    """
    total = max(1, sum(entry.size for entry in files.values()))
    turn = (rank + ranks // 2) % ranks
    found: list[Share] = []
    before = 0
    for name, entry in sorted(files.items()):
        for chunk in range(len(entry.chunks)):
            start, stop = entry.span(chunk)
            middle = 2 * before + start + stop
            if middle * ranks // (2 * total) == turn:
                if found and found[-1].file == name and found[-1].stop == chunk:
                    found[-1] = found[-1]._replace(stop=chunk + 1)
                else:
                    found.append(Share(name, chunk, chunk + 1))
        before += entry.size
    return found


def read_back(peers: Peers, path: Path, manifest: Manifest) -> None:
    """Compare every byte of a committed checkpoint with its digest. A collective over the peers.

    Raises:
        CheckpointError: on every rank alike: something differs. The checkpoint has lost its name by then and is called
            `step_N.damaged-…`.
    """
    attempt = Attempt()
    with attempt.step():
        if peers.rank == 0:
            drop_from_memory(path / MANIFEST)
            if open_manifest(path) != manifest:
                raise DamagedCheckpoint(path / MANIFEST, "is not the manifest that was written")
        for share in shares(manifest.files, peers.rank, peers.size):
            _compare(path / share.file, manifest.files[share.file], share)
    try:
        peers.raise_together(attempt.error, f"reading {path} back from the disk")
    except CheckpointError as error:
        aside = Attempt()
        if peers.rank == 0:
            with aside.step():
                set_aside(path)
        peers.raise_together(aside.error, f"taking the name from the damaged {path}")
        raise CheckpointError(f"{error}; it was set aside") from error


def drop_from_memory(path: Path, start: int = 0, size: int = 0) -> None:
    """Ask the kernel to forget a file's pages, so that a read comes from the disk. A missing file is no error.

    Works for pages that are on the disk already, and where the kernel listens; on another machine nothing is known.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _compare(path: Path, entry: FileEntry, share: Share) -> None:
    start, stop = entry.span(share.first)[0], entry.span(share.stop - 1)[1]
    drop_from_memory(path, start, stop - start)
    try:
        for chunk, data in _chunks(path, entry, share):
            refuse_other_bytes(path, entry, chunk, data)
    except OSError as error:
        raise DamagedCheckpoint(path, f"cannot be read: {error.strerror}") from error


def _chunks(path: Path, entry: FileEntry, share: Share) -> Iterator[tuple[int, memoryview]]:
    buffer = memoryview(bytearray(min(CHUNK_BYTES, entry.size)))
    with path.open("rb", buffering=0) as file:
        for chunk in range(share.first, share.stop):
            yield chunk, buffer[: read_at(file.fileno(), buffer, *entry.span(chunk))]
