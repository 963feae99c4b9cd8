"""Norm, range, mean, NaNs and infinities of tensors, read once in blocks of rows by several threads."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from checkpoints_tools.mover import Progress, in_threads, row_blocks
from checkpoints_tools.opened import Weights
from checkpoints_tools.regions import Key
from megalemur.model.names import hf_shapes

_PIECE = 1 << 18  # elements looked at together: they stay in the cache


@dataclass(frozen=True)
class Statistics:
    """Of a tensor or several. Range, sum and squares are those of the finite elements."""

    elements: int = 0
    nans: int = 0
    infinities: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    total: float = 0.0
    squares: float = 0.0

    @property
    def norm(self) -> float:
        """Euclidean."""
        return math.sqrt(self.squares)

    @property
    def finite(self) -> int:
        """Elements that are numbers."""
        return self.elements - self.nans - self.infinities

    @property
    def mean(self) -> float:
        """Of the finite elements; NaN where there is none."""
        return self.total / self.finite if self.finite else math.nan

    def joined(self, other: "Statistics") -> "Statistics":
        """Of both."""
        return Statistics(
            self.elements + other.elements,
            self.nans + other.nans,
            self.infinities + other.infinities,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
            self.total + other.total,
            self.squares + other.squares,
        )


def joined(parts: Iterable[Statistics]) -> Statistics:
    """Of all of them."""
    found = Statistics()
    for part in parts:
        found = found.joined(part)
    return found


def statistics_of(values: torch.Tensor) -> Statistics:
    """Of some elements; sums are fp64."""
    exact = values.double()
    nans = infinities = 0
    if not exact.sum().isfinite():  # a sum of finite fp32 elements stays far below what fp64 holds
        nans, infinities = int(exact.isnan().sum()), int(exact.isinf().sum())
        exact = exact[exact.isfinite()]
    if not len(exact):
        return Statistics(values.numel(), nans, infinities)
    minimum, maximum = (bound.item() for bound in exact.aminmax())
    squares = torch.dot(exact, exact).item()
    return Statistics(values.numel(), nans, infinities, minimum, maximum, exact.sum().item(), squares)


def all_statistics(
    weights: Weights, *, workers: int, progress: Progress = lambda count: None
) -> Mapping[Key, Statistics]:
    """Of every tensor; they do not depend on the number of threads.

    Args:
        weights: the checkpoint.
        workers: threads, each with a tensor of its own.
        progress: told of bytes that were read.

    Raises:
        DamagedCheckpoint: a tensor cannot be read, or is not what it says.
    """
    keys, shapes = list(weights.dtypes), hf_shapes(weights.model)
    found: dict[Key, Statistics] = {}

    def one(number: int) -> None:
        key, so_far = keys[number], Statistics()
        for first, last in row_blocks(shapes[key.name], weights.dtypes[key].itemsize):
            rows = weights.read(key, first, last)
            so_far = so_far.joined(joined(map(statistics_of, rows.reshape(-1).split(_PIECE))))
            progress(rows.nbytes)
        found[key] = so_far

    in_threads(one, len(keys), workers)
    return {key: found[key] for key in keys}
