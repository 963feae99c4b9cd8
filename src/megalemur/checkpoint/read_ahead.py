"""Reads portions of files in their order, one ahead of the one that is in use, and compares each with its digest."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megalemur.checkpoint.digests import read_at, read_verified
from megalemur.checkpoint.errors import DamagedCheckpoint, UnreadableCheckpoint
from megalemur.checkpoint.exchange import Attempt
from megalemur.checkpoint.portions import Portion, StoredFile
from megalemur.config.plain_files import open_plain


class Buffer:
    """Memory that is used again: fresh pages for every message would cost as much as the copy."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, size: int) -> torch.Tensor:
        """The first `size` bytes; what was there is lost."""
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size]


class ReadAhead:
    """Hands out the bytes of one portion after the other; a thread reads the next one meanwhile.

    After an error nothing more is read: what is handed out then holds anything.
    """

    def __init__(self, portions: Sequence[Portion], attempt: Attempt):
        self._waiting = iter(portions)
        self._attempt = attempt
        self._buffers = [Buffer(), Buffer()]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="megalemur-load")
        self._coming: tuple[torch.Tensor, Future[None]] | None = None
        self._file: StoredFile | None = None
        self._handle = -1
        self.read_bytes = 0

    def __enter__(self) -> "ReadAhead":
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self._close()

    def next(self) -> torch.Tensor:
        """The bytes of the next portion; valid until `next` is called again."""
        assert self._coming is not None, "there are no more portions"
        data, work = self._coming
        with self._attempt.step():
            work.result()
        self._begin()
        return data

    def _begin(self) -> None:
        self._coming = None
        portion = next(self._waiting, None)
        if portion is not None:
            self._buffers.reverse()
            data = self._buffers[0].of(portion.stop - portion.start)
            self._coming = data, self._thread.submit(self._read, portion, data)

    def _read(self, portion: Portion, data: torch.Tensor) -> None:
        if self._attempt.error is not None:
            return
        path, entry, buffer = portion.file.path, portion.file.entry, data.numpy().data
        try:
            self._open(portion.file)
            if entry is not None:
                read_verified(self._handle, path, entry, portion.chunk, buffer)
            elif (found := read_at(self._handle, buffer, portion.start, portion.stop)) != len(buffer):
                raise DamagedCheckpoint(path, f"ends at byte {portion.start + found} instead of {portion.file.size}")
        except OSError as error:
            raise UnreadableCheckpoint(path, f"cannot be read: {error.strerror}") from error
        self.read_bytes += len(buffer)

    def _open(self, file: StoredFile) -> None:
        if file is self._file:
            return
        self._close()
        # what was digested was never a link; other programs' directories are full of them
        self._handle = open_plain(file.path, follow_links=file.entry is None)
        self._file = file
        found = os.fstat(self._handle).st_size
        if found != file.size:
            raise DamagedCheckpoint(file.path, f"has {found} bytes instead of {file.size}")

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._handle)
            self._file = None
