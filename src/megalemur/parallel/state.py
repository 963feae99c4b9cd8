"""The word for a piece of training state: a Hugging Face tensor's name, a box inside it, and the values.

model says which boxes a local parameter is made of (`Segment`), optim says which flat part of a parameter this rank
owns (`Owned`), and checkpoint stores and finds `Piece`s. None of the three knows the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megalemur.parallel.boxes import Box, FlatBox, Segment, flat_boxes, whole

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


def _cuts(segment: Segment, start: int, stop: int) -> Iterator[FlatBox]:
    """Boxes of the Hugging Face tensor for the flat positions [start, stop) of a local parameter inside one segment;
    each with its flat position in the local parameter."""
    # local rows have exactly the box's columns, so the segment is one flat range too
    origin = segment.first_row * (segment.box.size // segment.box.shape[0])
    low, high = max(start, origin), min(stop, origin + segment.box.size)
    for inner, first in flat_boxes(segment.box.shape, low - origin, high - origin):
        yield FlatBox(inner.moved(segment.box.start), origin + first)


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
