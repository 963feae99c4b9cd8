"""A checkpoint of any format that was opened: what it says about itself, and its tensors' rows on request.

Nothing is mapped: a mapped file that is cut short ends the process instead of the conversion.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from checkpoints_tools.errors import UnfitSource
from checkpoints_tools.regions import Key, Region, Regions, problems, row_box
from megalemur.checkpoint.digests import CHUNK_BYTES, FileEntry, read_at, read_verified
from megalemur.checkpoint.errors import DamagedCheckpoint, UnreadableCheckpoint
from megalemur.config.model import ModelConfig
from megalemur.config.plain_files import open_plain
from megalemur.model.names import hf_shapes

_SHOWN = 10
"""Problems that a message lists."""


class Weights(Protocol):
    """Tensors that can be read by rows: an opened checkpoint, or one with changes laid over it."""

    @property
    def model(self) -> ModelConfig:
        """What the tensors make up."""

    @property
    def dtypes(self) -> Mapping[Key, torch.dtype]:
        """Of every tensor there is, in the order of the layers."""

    def read(self, key: Key, first: int, last: int) -> torch.Tensor:
        """Rows [first, last), contiguous, on the CPU.

        Raises:
            DamagedCheckpoint: the bytes cannot be had, or are not those that were written.
        """


@dataclass(frozen=True)
class Opened:
    """What a format found in a directory. Nothing but headers and small files was read."""

    format: str
    """Of formats.FORMATS."""
    path: Path
    model: ModelConfig
    regions: Regions
    follow_links: bool = True
    """Whether files may be links, as in the hub's cache."""
    entries: Mapping[str, FileEntry] = field(default_factory=dict, repr=False)
    """Digests of files, where the format has them: every byte that is read is then compared."""
    config: Mapping[str, Any] | None = None
    """Keys of a Hugging Face config.json, where there is one."""
    small_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Tokenizer and generation settings, by the names that Hugging Face gives them."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Step, layout, versions: what the format says besides, as JSON knows it."""
    notes: Sequence[str] = ()
    """What a reader should know: classes that were not called, tensors that no model loads."""

    def __post_init__(self) -> None:
        files = {region.file for found in self.regions.values() for region in found}
        sizes = {file: self._size(file) for file in files}
        found = list(problems(self.regions, hf_shapes(self.model), sizes))
        if found:
            listing = "".join(f"\n  - {problem}" for problem in found[:_SHOWN])
            more = f"\n  - and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise UnfitSource(f"{self.path}: the tensors do not make up the model:{listing}{more}")

    def _size(self, file: str) -> int:
        try:
            return (self.path / file).stat().st_size
        except OSError as error:
            raise UnreadableCheckpoint(self.path / file, f"cannot be read: {error.strerror}") from error

    @cached_property
    def dtypes(self) -> dict[Key, torch.dtype]:
        """Of every tensor, in the order of the layers."""
        kinds = sorted({key.kind for key in self.regions}, key=lambda kind: (kind != "weight", kind))
        keys = [Key(kind, name) for kind in kinds for name in hf_shapes(self.model)]
        return {key: self.regions[key][0].dtype for key in keys}

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return hf_shapes(self.model)  # asked for with every block of rows

    @cached_property
    def _reader(self) -> "_Reader":
        return _Reader(self.path, self.entries, follow_links=self.follow_links)

    def read(self, key: Key, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a tensor."""
        wanted = row_box(self._shapes[key.name], first, last)
        out = torch.empty(wanted.shape, dtype=self.dtypes[key])
        for region in self.regions[key]:
            common = region.box.intersect(wanted)
            if common is not None:
                self._reader.read(region.part(common), out[common.relative_to(wanted).slices])
        return out


class _Reader:
    """Open files, and the last compared chunk of each thread. Any number of threads may read."""

    def __init__(self, path: Path, entries: Mapping[str, FileEntry], *, follow_links: bool):
        self._path, self._entries, self._follow_links = path, entries, follow_links
        self._files: dict[str, int] = {}
        self._lock, self._mine = threading.Lock(), threading.local()

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def read(self, region: Region, out: torch.Tensor) -> None:
        """Fill a tensor of the region's shape."""
        rows = region.box.shape[0]
        if region.row_bytes == region.width and out.is_contiguous():
            self._bytes(region.file, region.offset, out.view(-1).view(torch.uint8).numpy().data)
            return
        # rows of something else lie in between, or the rows are parts of longer ones: read all, keep some
        scratch = torch.empty(region.stop - region.offset, dtype=torch.uint8)
        self._bytes(region.file, region.offset, scratch.numpy().data)
        rows_of_bytes = scratch.as_strided((rows, region.width), (region.row_bytes, 1))
        out.copy_(rows_of_bytes.contiguous().view(-1).view(region.dtype).view(out.shape))

    def _bytes(self, file: str, offset: int, buffer: memoryview) -> None:
        try:
            handle = self._open(file)
            if file in self._entries:
                self._compared(file, handle, offset, buffer)
                return
            count = read_at(handle, buffer, offset, offset + len(buffer))
        except OSError as error:
            raise UnreadableCheckpoint(self._path / file, f"cannot be read: {error.strerror}") from error
        if count < len(buffer):
            raise DamagedCheckpoint(self._path / file, f"ends at byte {offset + count}, inside a tensor")

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = open_plain(self._path / file, follow_links=self._follow_links)
            return self._files[file]

    def _compared(self, file: str, handle: int, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            chunk, inside = divmod(offset + done, CHUNK_BYTES)
            data = self._chunk(file, handle, chunk)[inside : inside + len(buffer) - done]
            if not data:
                raise DamagedCheckpoint(self._path / file, f"ends at byte {offset + done}, inside a tensor")
            buffer[done : done + len(data)] = data
            done += len(data)

    def _chunk(self, file: str, handle: int, chunk: int) -> memoryview:
        """One chunk, compared; the last one is kept, since rows are read in their order."""
        if getattr(self._mine, "which", None) != (file, chunk):
            entry = self._entries[file]
            if not hasattr(self._mine, "buffer"):
                self._mine.buffer = memoryview(bytearray(CHUNK_BYTES))
            self._mine.which = None
            start, stop = entry.span(min(chunk, max(0, len(entry.chunks) - 1)))
            if chunk >= len(entry.chunks):
                return memoryview(b"")
            read_verified(handle, self._path / file, entry, chunk, self._mine.buffer[: stop - start])
            self._mine.which, self._mine.size = (file, chunk), stop - start
        view: memoryview = self._mine.buffer[: self._mine.size]
        return view
