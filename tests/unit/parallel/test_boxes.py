"""Boxes: a flat range of a row-major tensor is a few rectangles, in order, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalemur.parallel.boxes import Box, flat_boxes


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 700), st.integers(0, 700))
def test_a_flat_range_is_covered_once_and_in_order(shape: list[int], one: int, other: int) -> None:
    positions = torch.arange(torch.Size(shape).numel()).reshape(shape)
    start, stop = sorted((min(one, positions.numel()), min(other, positions.numel())))
    found = list(flat_boxes(shape, start, stop))
    for box, first in found:
        inside = positions[box.slices].reshape(-1).tolist()
        assert inside == list(range(first, first + box.size)), "its elements lie one behind the other"
    assert [n for box, first in found for n in range(first, first + box.size)] == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


@pytest.mark.parametrize(
    ("start", "stop", "count"), [(0, 12, 1), (3, 9, 1), (1, 2, 1), (1, 4, 2), (2, 10, 3), (5, 5, 0)]
)
def test_of_a_matrix_there_are_at_most_three(start: int, stop: int, count: int) -> None:
    assert len(list(flat_boxes((4, 3), start, stop))) == count


def test_moving_undoes_relative_to() -> None:
    box, outer = Box((3, 5), (4, 9)), Box((2, 4), (10, 10))
    assert box.relative_to(outer).moved(outer.start) == box
