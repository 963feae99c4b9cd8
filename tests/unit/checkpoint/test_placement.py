"""Who writes what: once each, evenly, and nothing that does not cover the model."""

import pytest

from megalemur.checkpoint.errors import CheckpointError
from megalemur.checkpoint.placement import MASTER, Claim, place
from megalemur.parallel import state
from megalemur.parallel.boxes import Box, whole


def claims(*boxes: tuple[str, Box]) -> list[Claim]:
    return [Claim(name, MASTER, box) for name, box in boxes]


def test_the_word_for_masters_is_that_of_the_state() -> None:
    assert MASTER == state.MASTER


def test_copies_are_written_once_and_spread_evenly() -> None:
    shapes = {f"layer{i}": (4, 4) for i in range(8)}
    everything = claims(*((name, whole(shape)) for name, shape in shapes.items()))
    placed = place([everything] * 4, shapes)
    assert sorted(part.name for part in placed) == sorted(shapes)
    assert [sum(part.rank == rank for part in placed) for rank in range(4)] == [2, 2, 2, 2]


def test_shared_parts_go_to_the_rank_that_holds_little_of_its_own() -> None:
    shapes = {"big": (100,), "norm": (10,)}
    norm = ("norm", whole((10,)))
    placed = place([claims(("big", whole((100,))), norm), claims(norm)], shapes)
    assert {part.name: part.rank for part in placed} == {"big": 0, "norm": 1}


def test_copies_that_are_cut_differently_are_written_once() -> None:
    first = [claims(("tied", Box((0, 0), (5, 4)))), claims(("tied", Box((5, 0), (8, 4))))]
    last = [claims(("tied", Box((0, 0), (3, 4)))), claims(("tied", Box((3, 0), (8, 4))))]
    placed = place([*first, *last], {"tied": (8, 4)})
    assert sum(part.box.size for part in placed) == 32
    for part in placed:
        assert part.held.intersect(part.box) == part.box


def test_every_rank_order_of_claims_gives_the_same_answer() -> None:
    boxes = [("a", Box((0,), (3,))), ("a", Box((3,), (9,))), ("b", whole((4,)))]
    shapes = {"a": (9,), "b": (4,)}
    assert place([claims(*boxes)] * 3, shapes) == place([claims(*reversed(boxes))] * 3, shapes)


def test_gaps_are_all_listed_by_tensor() -> None:
    with pytest.raises(CheckpointError) as caught:
        place([claims(("a", Box((0,), (3,))))], {"a": (9,), "b": (4,)})
    assert "a (master): no rank holds 3:9 of shape [9]" in str(caught.value)
    assert "b (master): no rank holds 0:4" in str(caught.value)


def test_moments_of_some_tensors_only_are_refused() -> None:
    both = claims(("a", whole((2,))), ("b", whole((2,))))
    with pytest.raises(CheckpointError, match=r"b \(exp_avg\): no rank holds 0:2"):
        place([[*both, Claim("a", "exp_avg", whole((2,)))]], {"a": (2,), "b": (2,)})
