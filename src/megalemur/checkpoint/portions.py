"""Where the bytes of a state lie in files, who reads which portion of them, and what of it each rank wants.

Every rank computes the same answer from the same files and claims; nothing is negotiated. Reads no file.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from megalemur.checkpoint import digests
from megalemur.checkpoint.digests import FileEntry
from megalemur.parallel.boxes import Box, flat_boxes

Wanted = Mapping[tuple[str, str], Sequence[tuple[int, Box]]]
"""(kind, name) to (number of the piece on its rank, its box)."""


class Extent(NamedTuple):
    """Where a box of the state lies in a file: row after row, little-endian."""

    name: str
    kind: str
    box: Box
    dtype: torch.dtype
    offset: int
    """First byte in the file."""

    @property
    def stop(self) -> int:
        """The byte behind the last."""
        return self.offset + self.box.size * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class StoredFile:
    """A file, cut into spans that are read as a whole."""

    path: Path
    size: int
    """Bytes."""
    entry: FileEntry | None = field(repr=False)
    """Digests of its chunks, which are its spans; None: nobody digested it."""
    extents: tuple[Extent, ...] = field(repr=False)
    """What lies in it, by offset, without overlaps."""

    def spans(self) -> list[tuple[int, int]]:
        """[first byte, byte behind the last) of each span; no element lies in two of them.

        Without digests the spans bend to the elements, for other programs put them anywhere. With digests the spans
        are the chunks, and the manifest has refused every offset that would let an element straddle.
        """
        grid = digests.CHUNK_BYTES
        if self.entry is not None:
            return [self.entry.span(chunk) for chunk in range(len(self.entry.chunks))]
        borders = [0, *(self._border(at) for at in range(grid, self.size, grid)), self.size]
        return [(a, b) for a, b in pairwise(borders) if a < b]

    def _border(self, at: int) -> int:
        """The last border of an element at or before a byte."""
        before = bisect_right(self.extents, at, key=lambda extent: extent.offset) - 1
        if before < 0 or self.extents[before].stop <= at:
            return at
        extent = self.extents[before]
        return at - (at - extent.offset) % extent.dtype.itemsize

    def extents_in(self, start: int, stop: int) -> Sequence[Extent]:
        """Those that have a byte in [start, stop)."""
        first = bisect_right(self.extents, start, key=lambda extent: extent.stop)
        return self.extents[first : bisect_left(self.extents, stop, key=lambda extent: extent.offset)]


class Portion(NamedTuple):
    """A span of a file that one rank reads."""

    file: StoredFile
    chunk: int
    start: int
    stop: int
    reader: int
    turn: int
    """How many portions this reader reads before."""


class Part(NamedTuple):
    """What a rank wants of a portion: a box, inside a run of elements that lie one behind the other."""

    piece: int
    """Number of the piece on its rank."""
    box: Box
    run: Box
    offset: int
    """The run's first byte in the portion."""
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the box in the file's dtype."""
        return self.box.size * self.dtype.itemsize


def parts_of(portion: Portion, wanted: Wanted) -> Iterator[Part]:
    """What a rank wants of a portion, in the order in which it travels."""
    for extent in portion.file.extents_in(portion.start, portion.stop):
        claims = wanted.get((extent.kind, extent.name))
        if not claims:
            continue
        width = extent.dtype.itemsize
        low, high = max(portion.start, extent.offset), min(portion.stop, extent.stop)
        assert (low - extent.offset) % width == 0 == (high - extent.offset) % width, "an element in two portions"
        cuts = flat_boxes(extent.box.shape, (low - extent.offset) // width, (high - extent.offset) // width)
        for inner, first in cuts:
            run = inner.moved(extent.box.start)
            for piece, box in claims:
                shared = box.intersect(run)
                if shared is not None:
                    yield Part(piece, shared, run, extent.offset + first * width - portion.start, extent.dtype)


def share_out(files: Sequence[StoredFile], ranks: int) -> list[Portion]:
    """Every span of every file, each with its reader: shares even by bytes, each one run of neighbouring spans.

    Files with something to hand out are shared by themselves: whoever resumes in the layout that wrote them then reads
    about the file that it wrote, and little travels.
    """
    portions = []
    turns = [0] * ranks
    for group in ([f for f in files if f.extents], [f for f in files if not f.extents]):
        total, done = sum(file.size for file in group), 0
        for file in group:
            for chunk, (start, stop) in enumerate(file.spans()):
                reader = (2 * done + stop - start) * ranks // (2 * total)
                portions.append(Portion(file, chunk, start, stop, reader, turns[reader]))
                turns[reader] += 1
                done += stop - start
    return portions


def portions_for(portions: Sequence[Portion], wanted: Wanted) -> list[Portion]:
    """Those that hold something that a rank wants."""
    by_file: dict[StoredFile, list[Portion]] = {}
    for portion in portions:
        by_file.setdefault(portion.file, []).append(portion)
    found = []
    for file, own in by_file.items():
        near = set()
        for extent in file.extents:
            for _, box in wanted.get((extent.kind, extent.name), ()):
                near |= _near(own, extent, box)
        # near is a range of bytes: columns of a wide matrix may lie beside a whole portion
        found += [own[i] for i in sorted(near) if next(parts_of(own[i], wanted), None) is not None]
    return found


def _near(portions: Sequence[Portion], extent: Extent, box: Box) -> set[int]:
    """Numbers of the portions between the first and the last byte of what a box and an extent share."""
    shared = box.intersect(extent.box)
    if shared is None:
        return set()
    first, last = 0, 0
    inner = shared.relative_to(extent.box)
    for a, b, width in zip(inner.start, inner.stop, extent.box.shape, strict=True):
        first, last = first * width + a, last * width + b - 1
    size = extent.dtype.itemsize
    low = bisect_right(portions, extent.offset + first * size, key=lambda p: p.stop)
    high = bisect_right(portions, extent.offset + last * size, key=lambda p: p.start)
    return set(range(low, high))
