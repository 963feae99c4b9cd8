"""Arithmetic of boxes against the plain one: sets of elements."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from megalemur.checkpoint.cover import disjoint, gap, inside, outside, overlapping
from megalemur.parallel.boxes import Box


def elements(box: Box) -> set[tuple[int, ...]]:
    return set(product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True))))


@st.composite
def boxes(draw: st.DrawFn, dimensions: int = 2, extent: int = 7) -> Box:
    ends = [
        sorted(draw(st.lists(st.integers(0, extent), min_size=2, max_size=2, unique=True))) for _ in range(dimensions)
    ]
    return Box(tuple(a for a, _ in ends), tuple(b for _, b in ends))


@given(boxes(), boxes())
def test_what_lies_outside_is_the_difference_of_the_elements(one: Box, other: Box) -> None:
    parts = outside(one, other)
    assert sum(part.size for part in parts) == len(elements(one) - elements(other))
    assert set().union(*map(elements, parts)) == elements(one) - elements(other)


@given(st.lists(boxes(), max_size=6))
def test_overlaps_are_found_exactly(many: list[Box]) -> None:
    shares = any(elements(a) & elements(b) for i, a in enumerate(many) for b in many[:i])
    assert (next(overlapping(many), None) is not None) == shares


@given(st.lists(boxes(), min_size=1, max_size=6, unique=True))
def test_disjoint_parts_hold_each_element_once_and_lie_in_their_box(many: list[Box]) -> None:
    parts = disjoint(many)
    assert sum(part.size for part, _ in parts) == len(set().union(*map(elements, many)))
    assert all(elements(part) <= elements(box) and box in many for part, box in parts)


@given(st.lists(boxes(), max_size=6))
def test_a_gap_is_reported_when_and_only_when_there_is_one(many: list[Box]) -> None:
    parts = [part for part, _ in disjoint(many)]
    left = elements(Box((0, 0), (7, 7))) - set().union(*map(elements, many))
    missing = gap(parts, (7, 7))
    assert (missing is None) == (not left)
    assert missing is None or elements(missing) <= left


def test_only_rectangles_of_the_tensor_are_inside() -> None:
    assert inside(Box((0, 1), (2, 3)), (2, 3))
    assert not inside(Box((0, 1), (2, 4)), (2, 3))
    assert not inside(Box((0, 1), (2, 1)), (2, 3))
    assert not inside(Box((0,), (2,)), (2, 3))
