"""Arithmetic of boxes: do they cover a tensor, do they overlap, what of one lies outside another. Free of torch."""

from collections.abc import Iterable, Iterator, Sequence

from megalemur.parallel.boxes import Box


def outside(box: Box, other: Box) -> list[Box]:
    """Disjoint boxes that make up `box` without `other`: at most two a dimension."""
    if box.intersect(other) is None:
        return [box]
    parts = []
    start, stop = list(box.start), list(box.stop)
    for axis in range(len(start)):
        low, high = max(start[axis], other.start[axis]), min(stop[axis], other.stop[axis])
        for first, last in ((start[axis], low), (high, stop[axis])):
            if first < last:
                cut = Box(
                    (*start[:axis], first, *start[axis + 1 :]),
                    (*stop[:axis], last, *stop[axis + 1 :]),
                )
                parts.append(cut)
        start[axis], stop[axis] = low, high
    return parts


def overlapping(boxes: Iterable[Box]) -> Iterator[tuple[Box, Box]]:
    """Pairs that share an element. A sweep over the first dimension: boxes that share no row are never compared."""
    active: list[Box] = []
    for box in sorted(boxes):
        active = [other for other in active if not other.stop or other.stop[0] > box.start[0]]
        for other in active:
            if other.intersect(box) is not None:
                yield other, box
        active.append(box)


def disjoint(boxes: Sequence[Box]) -> list[tuple[Box, Box]]:
    """(part, the given box it lies in): the same elements as `boxes`, each exactly once. Larger boxes stay whole."""
    if next(overlapping(boxes), None) is None:
        return [(box, box) for box in boxes]
    kept: list[tuple[Box, Box]] = []
    for box in sorted(boxes, key=lambda b: (-b.size, b)):
        parts = [box]
        for other, _ in kept:
            parts = [piece for part in parts for piece in outside(part, other)]
        kept += [(part, box) for part in parts]
    return kept


def inside(box: Box, shape: Sequence[int]) -> bool:
    """Whether the box is a non-empty rectangle of a tensor of this shape."""
    return len(box.start) == len(box.stop) == len(shape) and all(
        0 <= a < b <= extent for a, b, extent in zip(box.start, box.stop, shape, strict=True)
    )


def gap(boxes: Sequence[Box], shape: Sequence[int]) -> Box | None:
    """A part of the tensor that disjoint boxes leave uncovered, or None when they cover it exactly."""
    left = [Box((0,) * len(shape), tuple(shape))]
    if sum(box.size for box in boxes) == left[0].size:
        return None
    for box in boxes:
        left = [piece for part in left for piece in outside(part, box)]
    return left[0] if left else None
