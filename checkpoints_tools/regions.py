"""Where a checkpoint keeps its tensors: boxes of Hugging Face tensors as rows in files.

Everything is named and shaped as Hugging Face has it: fused, split, permuted or padded storage is a matter of regions.
A vector counts as a matrix of one column.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from megalemur.checkpoint.cover import gap, overlapping
from megalemur.checkpoint.manifest import box_text
from megalemur.parallel.boxes import Box, whole

WEIGHT = "weight"
"""The kind of what a model computes with; optimizer state is `master`, `exp_avg` and `exp_avg_sq`."""


class Key(NamedTuple):
    """A tensor of a checkpoint."""

    kind: str
    name: str
    """Hugging Face's."""


class Region(NamedTuple):
    """A box of a tensor in a file: row after row of the box, each at a fixed distance from the one before."""

    box: Box
    file: str
    """Relative to the checkpoint's directory."""
    offset: int
    """First byte of the box's first row."""
    row_bytes: int
    """From the beginning of a row to that of the next: more than a row is long where other rows lie in between."""
    dtype: torch.dtype

    @property
    def columns(self) -> int:
        """Elements of a row of the box."""
        return math.prod(self.box.shape[1:])

    @property
    def width(self) -> int:
        """Bytes of a row of the box."""
        return self.columns * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """The byte behind the last."""
        return self.offset + (self.box.shape[0] - 1) * self.row_bytes + self.width

    def part(self, box: Box) -> "Region":
        """The region of a smaller box."""
        inner = box.relative_to(self.box)
        column = inner.start[1] if len(inner.start) == 2 else 0
        offset = self.offset + inner.start[0] * self.row_bytes + column * self.dtype.itemsize
        return self._replace(box=box, offset=offset)


def contiguous(box: Box, file: str, offset: int, dtype: torch.dtype) -> Region:
    """A box whose rows lie one behind the other."""
    return Region(box, file, offset, math.prod(box.shape[1:]) * dtype.itemsize, dtype)


Regions = Mapping[Key, Sequence[Region]]


def row_box(shape: Sequence[int], first: int, last: int) -> Box:
    """Rows [first, last) of a tensor."""
    return Box((first, *(0 for _ in shape[1:])), (last, *shape[1:]))


def problems(regions: Regions, shapes: Mapping[str, Sequence[int]], sizes: Mapping[str, int]) -> Iterable[str]:
    """What is wrong with a checkpoint's table of regions: tensors that are too much, gaps, overlaps, bytes that no file
    has, two dtypes in one tensor.

    Args:
        regions: of the whole checkpoint.
        shapes: every tensor that there must be; each kind has all of them.
        sizes: bytes of each file.
    """
    kinds = sorted({key.kind for key in regions})
    for key in [Key(kind, name) for kind in kinds for name in shapes]:
        yield from _problems_of(key, regions.get(key, ()), shapes[key.name], sizes)
    yield from (f"{key.name} ({key.kind}): no Llama of this shape has it" for key in regions if key.name not in shapes)


def _problems_of(key: Key, found: Sequence[Region], shape: Sequence[int], sizes: Mapping[str, int]) -> Iterable[str]:
    what, boxes = f"{key.name} ({key.kind})", [region.box for region in found]
    if not found:
        yield f"{what} is missing"
        return
    for region in found:
        if whole(shape).intersect(region.box) != region.box:
            yield f"{what}: [{box_text(region.box)}] in {region.file} lies outside its shape {list(shape)}"
            return
        if region.offset < 0 or region.stop > sizes.get(region.file, -1):
            yield f"{what}: bytes [{region.offset}, {region.stop}) lie outside {region.file}"
    if len({region.dtype for region in found}) > 1:
        yield f"{what}: has several dtypes: {', '.join(sorted({str(region.dtype) for region in found}))}"
    for one, other in overlapping(boxes):
        yield f"{what}: [{box_text(one)}] and [{box_text(other)}] overlap"
    missing = gap(boxes, tuple(shape))
    if missing is not None:
        yield f"{what}: [{box_text(missing)}] is nowhere"
