"""Moves the rows of tensors to where a layout wants them: read, digest, write, a block at a time, by several threads.

Threads, not processes: reading, writing, digesting and casting all let go of the interpreter's lock, and one process
has one set of imports. Memory is a few blocks a thread, whatever the tensors' size.
"""

import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch
import xxhash

from checkpoints_tools.draft import Done, Draft, replace_file, write_at
from checkpoints_tools.layout import Layout, Stretch, Written
from checkpoints_tools.opened import Weights
from checkpoints_tools.regions import Key, Region, row_box
from megalemur.checkpoint import disk
from megalemur.checkpoint.digests import ChunkDigester
from megalemur.checkpoint.errors import CheckpointError
from megalemur.model.names import hf_shapes

BLOCK_BYTES = 16 << 20
"""Bytes of the rows that are read and written at once."""
_START_BYTES = 32 << 20
"""The disk begins with so many bytes at a time while more are written."""

Progress = Callable[[int], None]
"""Told how many bytes of tensors were dealt with."""


def row_blocks(shape: Sequence[int], item_bytes: int) -> Iterator[tuple[int, int]]:
    """[first, last) of the rows that are dealt with at once."""
    rows = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * item_bytes))
    for first in range(0, shape[0], rows):
        yield first, min(first + rows, shape[0])


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def digest_of(weights: Weights, key: Key, shape: Sequence[int], progress: Progress) -> str:
    """xxh3_128 of a tensor's rows, in their order."""
    digest = xxhash.xxh3_128()
    for first, last in row_blocks(shape, weights.dtypes[key].itemsize):
        data = bytes_of(weights.read(key, first, last))
        digest.update(data)
        progress(len(data))
    return digest.hexdigest()


def in_threads(work: Callable[[int], None], count: int, workers: int) -> None:
    """`work(0)` to `work(count - 1)`; the first error ends all that has not begun."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, number) for number in range(count)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            for future in futures:
                future.cancel()
    for future in done:
        future.result()


class Mover:
    """Writes a layout's files into a draft."""

    def __init__(self, weights: Weights, layout: Layout, draft: Draft):
        self._weights, self._layout, self._draft = weights, layout, draft
        self._shapes = hf_shapes(weights.model)
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}

    def move(self, workers: int, progress: Progress) -> None:
        """Everything that is not done yet, brought to the disk."""
        try:
            self._create()
            left = [n for n in range(len(self._layout.units)) if n not in self._draft.done]
            in_threads(lambda n: self._unit(left[n], progress), len(left), workers)
        except OSError as error:
            name = error.filename or self._draft.tree
            raise CheckpointError(f"{name} cannot be written: {error.strerror}; --resume goes on from here") from error
        finally:
            for handle in self._files.values():
                os.close(handle)

    def _create(self) -> None:
        for name, size in self._layout.sizes.items():
            path = self._draft.tree / name
            disk.make_directories(path.parent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            handle = self._files[name] = os.open(path, flags, 0o666)
            os.ftruncate(handle, size)
            for frame in self._layout.frames.get(name, ()):
                write_at(handle, frame.data, frame.offset)

    def _unit(self, number: int, progress: Progress) -> None:
        unit = _Unit(self._layout, self._files)
        digests: dict[str, dict[str, str]] = {}
        for key in self._layout.units[number]:
            digests.setdefault(key.kind, {})[key.name] = self._tensor(key, unit, progress)
        unit.sync()
        with self._lock:
            self._draft.note(
                Done(
                    unit=number,
                    digests=digests,
                    entries={name: (e.size, list(e.chunks)) for name, d in unit.digesters.items() if (e := d.entry())},
                    stretches={name: [tuple(s) for s in found] for name, found in unit.stretches.items()},  # type: ignore[misc]
                )
            )

    def _tensor(self, key: Key, unit: "_Unit", progress: Progress) -> str:
        shape, digest = self._shapes[key.name], xxhash.xxh3_128()
        for first, last in row_blocks(shape, self._weights.dtypes[key].itemsize):
            block, box = self._weights.read(key, first, last), row_box(shape, first, last)
            digest.update(bytes_of(block))
            for region in self._layout.regions[key]:
                common = region.box.intersect(box)
                if common is not None:
                    unit.write(region.part(common), block[common.relative_to(box).slices])
            progress(block.nbytes)
        return digest.hexdigest()


@dataclass
class _Unit:
    """What one thread has written of its unit."""

    layout: Layout
    files: Mapping[str, int]
    digesters: dict[str, ChunkDigester] = field(default_factory=dict)
    stretches: dict[str, list[Stretch]] = field(default_factory=dict)
    touched: dict[str, int] = field(default_factory=dict)
    """File to bytes that the disk was not told of."""

    def write(self, region: Region, block: torch.Tensor) -> None:
        """Rows of a region that lie one behind the other."""
        assert region.row_bytes == region.width and block.dtype == region.dtype, region
        data, file = bytes_of(block.contiguous()), self.files[region.file]
        write_at(file, data, region.offset)
        if self.layout.digest_files:
            self._digest(region, data)
        if self.layout.crc:
            stretch = Stretch(region.offset, len(data), zlib.crc32(data))
            self.stretches.setdefault(region.file, []).append(stretch)
        waiting = self.touched.get(region.file, 0) + len(data)
        if waiting >= _START_BYTES:
            disk.start_writing(file, max(0, region.offset + len(data) - waiting), waiting)
            waiting = 0
        self.touched[region.file] = waiting

    def _digest(self, region: Region, data: memoryview) -> None:
        if region.file not in self.digesters:
            self.digesters[region.file] = ChunkDigester()
            for frame in self.layout.frames.get(region.file, ()):
                self.digesters[region.file].update(frame.data)
        assert self.digesters[region.file].entry().size == region.offset, "one unit a file, in the order of its bytes"
        self.digesters[region.file].update(data)

    def sync(self) -> None:
        """Bring the unit's bytes to the disk."""
        for name in self.touched:
            os.fdatasync(self.files[name])


def written(draft: Draft) -> Written:
    """What the journal says of the bytes."""
    entries, stretches = {}, dict[str, list[Stretch]]()
    for done in draft.done.values():
        entries.update(done.file_entries())
        for file, found in done.file_stretches().items():
            stretches.setdefault(file, []).extend(found)
    return Written(entries, {file: sorted(found) for file, found in stretches.items()})


def digests(draft: Draft) -> dict[Key, str]:
    """What the journal says of the tensors."""
    return {
        Key(kind, name): digest
        for done in draft.done.values()
        for kind, found in done.digests.items()
        for name, digest in found.items()
    }


def finish_files(layout: Layout, draft: Draft) -> None:
    """Small files, and what a format can only write once the tensors are there; all of it on the disk."""
    for name, data in layout.small_files.items():
        replace_file(draft.tree / name, data)
    layout.finish(draft.tree, written(draft))
    for path in sorted(draft.tree.rglob("*")):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                disk.sync(handle)
            finally:
                os.close(handle)
