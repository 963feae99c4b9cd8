"""Rectangles of Hugging Face tensors, and what a local parameter is made of. Free of torch: converters use it too."""

from collections.abc import Sequence
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


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


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
