"""The word for a piece of training state: a Hugging Face tensor's name, a box inside it, and the values.

model says which boxes a local parameter is made of (`Segment`), optim says which flat part of a parameter this rank
owns (`Owned`), and checkpoint stores and finds `Piece`s. None of the three knows the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megalemur.parallel.boxes import Box, Segment, whole

__all__ = ["EXP_AVG", "EXP_AVG_SQ", "KINDS", "MASTER", "Box", "Owned", "Piece", "Segment", "pieces_of", "whole"]

MASTER, EXP_AVG, EXP_AVG_SQ = "master", "exp_avg", "exp_avg_sq"
KINDS = (MASTER, EXP_AVG, EXP_AVG_SQ)


@dataclass(frozen=True)
class Owned:
    """Elements [start, stop) of a flattened local parameter that this rank holds in fp32, with its moments."""

    parameter: torch.nn.Parameter
    start: int
    stop: int
    tensors: Mapping[str, torch.Tensor]
    """Kind (KINDS; moments are absent before the first step) to a tensor of stop - start elements; any shape."""


@dataclass(frozen=True)
class Piece:
    """Part of the state that this rank holds: `tensor` is a view with the box's shape; writing to it is loading."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """Full shape of the Hugging Face tensor."""
    box: Box
    tensor: torch.Tensor


class _Cut(NamedTuple):
    box: Box
    start: int
    """Flat position in the local parameter."""


def _cuts(segment: Segment, start: int, stop: int) -> Iterator[_Cut]:
    """Rectangles that cover flat positions [start, stop) of a local parameter inside one segment.

    A flat range of a row-major matrix is at most three rectangles: the end of a row, whole rows, the start of a row.
    """
    width = 1 if len(segment.box.start) == 1 else segment.box.shape[1]
    origin = segment.first_row * width
    low, high = max(start, origin), min(stop, origin + segment.box.size)
    while low < high:
        row, column = divmod(low - origin, width)
        if column == 0 and high - low >= width:
            rows, columns = (high - low) // width, width
        else:
            rows, columns = 1, min(width - column, high - low)
        first_row = segment.box.start[0] + row
        if len(segment.box.start) == 1:
            box = Box((first_row,), (first_row + rows,))
        else:
            first_column = segment.box.start[1] + column
            box = Box((first_row, first_column), (first_row + rows, first_column + columns))
        yield _Cut(box, low)
        low += rows * columns


def pieces_of(owned: Sequence[Owned], segments: Mapping[torch.nn.Parameter, Sequence[Segment]]) -> list[Piece]:
    """This rank's state in Hugging Face coordinates; vocabulary padding is left out.

    Args:
        owned: what the optimizer holds on this rank.
        segments: what each local parameter is made of.
    """
    pieces = []
    for part in owned:
        for segment in segments[part.parameter]:
            for cut in _cuts(segment, part.start, part.stop):
                first = cut.start - part.start
                for kind, tensor in part.tensors.items():
                    view = tensor.view(-1)[first : first + cut.box.size].view(cut.box.shape)
                    pieces.append(Piece(segment.name, kind, segment.shape, cut.box, view))
    return pieces
