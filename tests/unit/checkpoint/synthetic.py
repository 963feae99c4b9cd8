"""A small made-up state: every element of every tensor and kind has a value of its own."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from megalemur.checkpoint.cover import outside
from megalemur.checkpoint.save import Contents
from megalemur.parallel.state import KINDS, Box, Piece, whole

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (24, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
}


def full_state(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[tuple[str, str], torch.Tensor]:
    """(name, kind) to its whole tensor; not representable in bf16, so that rounding anywhere shows."""
    state, first = {}, 0
    for name, shape in shapes.items():
        for kind in KINDS:
            count = torch.Size(shape).numel()
            state[name, kind] = ((torch.arange(first, first + count) + 0.123) / 1000).reshape(shape)
            first += count
    return state


def pieces_at(boxes: Iterable[tuple[str, Box]], *, filled: bool = True, kinds: Sequence[str] = KINDS) -> list[Piece]:
    """The pieces a rank with these boxes holds: with their values, or NaN where they wait to be loaded."""
    state, pieces = full_state(), []
    for name, box in boxes:
        for kind in kinds:
            tensor = state[name, kind][box.slices].clone() if filled else torch.full(box.shape, torch.nan)
            pieces.append(Piece(name, kind, SHAPES[name], box, tensor))
    return pieces


def whole_pieces(*, filled: bool = True, kinds: Sequence[str] = KINDS) -> list[Piece]:
    """The whole state on one rank."""
    return pieces_at([(name, whole(shape)) for name, shape in SHAPES.items()], filled=filled, kinds=kinds)


def assert_loaded(pieces: Sequence[Piece]) -> None:
    """Every element is the one that was saved, bit by bit."""
    state = full_state()
    for piece in pieces:
        assert torch.equal(piece.tensor, state[piece.name, piece.kind][piece.box.slices]), piece


def contents(pieces: Sequence[Piece], step: int = 5, **changes: Any) -> Contents:
    """Contents of a checkpoint with small files around the state."""
    values: dict[str, Any] = {
        "step": step,
        "pieces": pieces,
        "shapes": SHAPES,
        "dtypes": dict.fromkeys(SHAPES, torch.bfloat16),
        "files": {"config.json": b'{"model_type": "llama"}', "run.yaml": b"run: {}\n"},
        "state": {"step": step, "loss": 0.1},
        "record": {"layout": {"tensor": 2}},
    }
    return Contents(**{**values, **changes})


def random_split(shape: tuple[int, ...], cuts: Iterable[tuple[int, int, int, int]]) -> list[Box]:
    """Disjoint boxes that cover a tensor: each cut takes a rectangle out of whatever is still in one piece."""
    boxes = [whole(shape)]
    for numbers in cuts:
        starts = tuple(n % extent for n, extent in zip(numbers, shape, strict=False))
        stops = tuple(a + 1 + n % (e - a) for a, n, e in zip(starts, numbers[2:], shape, strict=False))
        cutter = Box(starts, stops)
        parts = []
        for box in boxes:
            shared = box.intersect(cutter)
            parts += [box] if shared is None else [shared, *outside(box, cutter)]
        boxes = parts
    return boxes
