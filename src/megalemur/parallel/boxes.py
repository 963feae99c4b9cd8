"""Rectangles of Hugging Face tensors, and what a local parameter is made of. Free of torch: converters use it too."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle inside a tensor: start (inclusive) and stop (exclusive) per dimension."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent per dimension."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    def intersect(self, other: "Box") -> "Box | None":
        """The common rectangle, or None."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def relative_to(self, outer: "Box") -> "Box":
        """The same rectangle in coordinates that begin at `outer`'s start."""
        return Box(
            tuple(a - o for a, o in zip(self.start, outer.start, strict=True)),
            tuple(b - o for b, o in zip(self.stop, outer.start, strict=True)),
        )

    def moved(self, by: Sequence[int]) -> "Box":
        """The same rectangle, each coordinate further by `by`: the inverse of `relative_to`."""
        return Box(
            tuple(a + d for a, d in zip(self.start, by, strict=True)),
            tuple(b + d for b, d in zip(self.stop, by, strict=True)),
        )


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


class FlatBox(NamedTuple):
    """A rectangle whose elements lie one behind the other in a row-major tensor."""

    box: Box
    start: int
    """Flat position of its first element."""


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[FlatBox]:
    """Rectangles that cover the flat elements [start, stop) of a row-major tensor, in their order.

    Of a matrix there are at most three: the end of a row, whole rows, the start of a row.
    """
    if len(shape) == 1:
        if start < stop:
            yield FlatBox(Box((start,), (stop,)), start)
        return
    width = 1
    for extent in shape[1:]:
        width *= extent
    while start < stop:
        row, column = divmod(start, width)
        if column == 0 and stop - start >= width:
            last = stop // width
            yield FlatBox(Box((row, *[0] * (len(shape) - 1)), (last, *shape[1:])), start)
            start = last * width
            continue
        end = min(stop, (row + 1) * width)
        for inner, first in flat_boxes(shape[1:], column, end - row * width):
            yield FlatBox(Box((row, *inner.start), (row + 1, *inner.stop)), row * width + first)
        start = end


@dataclass(frozen=True)
class Segment:
    """Rows [first_row, first_row + box rows) of a local parameter are `box` of the Hugging Face tensor `name`.

    The local rows have exactly the box's columns. A 1-D tensor's elements are rows of width 1. Rows of a local
    parameter that no segment covers are vocabulary padding.
    """

    name: str
    shape: tuple[int, ...]
    """Full shape of the Hugging Face tensor."""
    box: Box
    first_row: int
