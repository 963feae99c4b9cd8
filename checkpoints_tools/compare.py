"""Two checkpoints of any formats, tensor by tensor: settings, names, shapes, and every value.

Memory is a few blocks of rows a thread. Optimizer state that only one of the two has is named and not compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import xxhash

from checkpoints_tools.mover import Progress, bytes_of, in_threads, row_blocks
from checkpoints_tools.opened import Weights
from checkpoints_tools.regions import Key
from megalemur.config.model import ModelConfig
from megalemur.model.names import hf_shapes

_PIECE = 1 << 18  # elements looked at one by one where a block differs: they stay in the cache
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOT_COMPARED = {"preset", "backend", "init_std"}  # they say how a run is made and not what a model is


class Setting(NamedTuple):
    """A setting of the models that is not the same."""

    name: str
    a: Any
    b: Any


@dataclass
class TensorComparison:
    """One tensor in both checkpoints."""

    key: Key
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[torch.dtype, torch.dtype]
    digests: tuple[str, str] = ("", "")
    """xxh3_128 of the rows in their order, each as it is stored; empty where the shapes differ."""
    differing: int = 0
    """Elements whose bits are not the same, after the cast where there is one."""
    max_difference: float = 0.0
    """Infinite where one side has a NaN or an infinity that the other has not."""
    squares: float = 0.0
    """Sum of the squared differences."""

    @property
    def same_shape(self) -> bool:
        """Whether the values could be compared."""
        return self.shapes[0] == self.shapes[1]

    @property
    def elements(self) -> int:
        """Of the first."""
        return math.prod(self.shapes[0])

    @property
    def rms_difference(self) -> float:
        """Root of the mean squared difference over all elements."""
        return math.sqrt(self.squares / self.elements)

    @property
    def compared_as(self) -> torch.dtype:
        """The dtype in which the values were compared."""
        return narrower(*self.dtypes)

    def within(self, tolerance: float) -> bool:
        """Whether no element differs by more than that; 0 asks for equal bits."""
        if not self.same_shape:
            return False
        return self.differing == 0 or (tolerance > 0 and self.max_difference <= tolerance)


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints have in common, and what not."""

    settings: Sequence[Setting]
    """Those of the models that differ."""
    tensors: Sequence[TensorComparison]
    """Those that both have, in the order of the layers."""
    alone: tuple[Sequence[Key], Sequence[Key]]
    """Tensors that only the first has, and only the second, of the kinds that both have."""
    left_out: tuple[Sequence[str], Sequence[str]]
    """Kinds that only the first has, and only the second: optimizer state."""

    @property
    def cast(self) -> Sequence[TensorComparison]:
        """Tensors that have two dtypes."""
        return [one for one in self.tensors if one.dtypes[0] != one.dtypes[1]]

    def beyond(self, tolerance: float) -> Sequence[TensorComparison]:
        """Tensors that differ by more than that."""
        return [one for one in self.tensors if not one.within(tolerance)]

    def equal(self, tolerance: float = 0.0) -> bool:
        """Whether they are the same model with the same values."""
        return not (self.settings or any(self.alone) or self.beyond(tolerance))


def differing_settings(a: ModelConfig, b: ModelConfig) -> list[Setting]:
    """What two models are not alike in."""
    names = [name for name in ModelConfig.model_fields if name not in _NOT_COMPARED]
    return [Setting(n, getattr(a, n), getattr(b, n)) for n in names if getattr(a, n) != getattr(b, n)]


def narrower(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The dtype in which values of two dtypes are compared: a conversion to fewer bits is right if it rounded right.

    Of bf16 and fp16 it is the second: what the first became.
    """
    return a if a.itemsize < b.itemsize else b


def bytes_to_compare(a: Weights, b: Weights) -> int:
    """Of the first checkpoint: what `compare` reports as progress in the end."""
    shapes = hf_shapes(a.model)
    return sum(math.prod(shapes[one.key.name]) * one.dtypes[0].itemsize for one in _pairs(a, b) if one.same_shape)


def compare(a: Weights, b: Weights, *, workers: int, progress: Progress = lambda count: None) -> Comparison:
    """Read both and compare.

    Args:
        a: one checkpoint.
        b: another.
        workers: threads, each with a tensor of its own.
        progress: told of the first checkpoint's bytes.

    Raises:
        DamagedCheckpoint: one of them cannot be read, or is not what it says.
    """
    pairs = _pairs(a, b)
    to_read = [one for one in pairs if one.same_shape]
    in_threads(lambda number: _fill(to_read[number], a, b, progress), len(to_read), workers)
    kinds_a, kinds_b = ({key.kind for key in weights.dtypes} for weights in (a, b))
    both = kinds_a & kinds_b
    return Comparison(
        settings=differing_settings(a.model, b.model),
        tensors=pairs,
        alone=(_alone(a, b, both), _alone(b, a, both)),
        left_out=(sorted(kinds_a - both), sorted(kinds_b - both)),
    )


def _pairs(a: Weights, b: Weights) -> list[TensorComparison]:
    shapes = hf_shapes(a.model), hf_shapes(b.model)
    return [
        TensorComparison(key, (shapes[0][key.name], shapes[1][key.name]), (a.dtypes[key], b.dtypes[key]))
        for key in a.dtypes
        if key in b.dtypes
    ]


def _alone(one: Weights, other: Weights, kinds: set[str]) -> list[Key]:
    return [key for key in one.dtypes if key.kind in kinds and key not in other.dtypes]


def _fill(pair: TensorComparison, a: Weights, b: Weights, progress: Progress) -> None:
    digests = xxhash.xxh3_128(), xxhash.xxh3_128()
    widest = max(dtype.itemsize for dtype in pair.dtypes)
    for first, last in row_blocks(pair.shapes[0], widest):
        rows = [weights.read(pair.key, first, last).reshape(-1) for weights in (a, b)]
        for digest, found in zip(digests, rows, strict=True):
            digest.update(bytes_of(found))
        progress(rows[0].nbytes)
        x, y = (_bits(found.to(pair.compared_as)) for found in rows)
        if not torch.equal(x, y):
            _count(pair, x, y)
    pair.digests = digests[0].hexdigest(), digests[1].hexdigest()


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(_INTEGERS[values.dtype.itemsize])


def _count(pair: TensorComparison, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add what differs between the bits of two blocks."""
    # the difference of two 16-bit values fits fp32 but for its last bit
    wide = torch.float64 if pair.compared_as.itemsize > 2 else torch.float32
    for a, b in zip(x.split(_PIECE), y.split(_PIECE), strict=True):
        unequal = a != b
        count = int(unequal.sum())
        if count:
            gaps = (a.view(pair.compared_as).to(wide) - b.view(pair.compared_as).to(wide)).abs_()
            if not gaps.max().isfinite():  # a NaN is no difference where the other side has the same
                gaps = torch.where(unequal, gaps.nan_to_num(nan=math.inf, posinf=math.inf), 0)
            pair.differing += count
            pair.max_difference = max(pair.max_difference, gaps.max().item())
            pair.squares += gaps.double().square_().sum().item()
