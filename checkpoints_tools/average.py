"""The mean of several checkpoints' weights, laid over them while they are read."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from checkpoints_tools.compare import differing_settings
from checkpoints_tools.errors import ConversionError, RequestError
from checkpoints_tools.opened import Weights
from checkpoints_tools.printing import dtype_text
from checkpoints_tools.regions import WEIGHT, Key
from megalemur.model.names import hf_shapes

_PIECE = 1 << 18  # elements summed together: they stay in the cache


class Average:
    """The mean, or weighted mean, of the weights of checkpoints of one model; optimizer state is left out.

    Each element is summed in fp64, in the order of the checkpoints, and then rounded to the result's dtype: it depends
    neither on the number of threads nor on the blocks that are read. The mean of equal checkpoints is the checkpoint.
    """

    def __init__(
        self,
        checkpoints: Sequence[Weights],
        shares: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Nothing is read yet.

        Args:
            checkpoints: two or more, of one model.
            shares: how much each counts, in any unit; None: all alike.
            dtype: of the result; None: that of the checkpoints, which must then be the same tensor by tensor.

        Raises:
            RequestError: fewer than two checkpoints, or shares that are no weights of a mean.
            ConversionError: the checkpoints are not of one model, or have several dtypes and none was asked for.
        """
        if len(checkpoints) < 2:
            raise RequestError("a mean takes two checkpoints at least")
        self._checkpoints, self._shares = checkpoints, _checked(shares, len(checkpoints))
        for number, (one, other) in enumerate(pairwise(checkpoints), 2):
            _refuse_other_model(one, other, number)
        self.model = checkpoints[0].model
        self._shapes = hf_shapes(self.model)
        self.dtypes = {key: dtype or old for key, old in checkpoints[0].dtypes.items() if key.kind == WEIGHT}
        if dtype is None:
            self._refuse_several_dtypes()

    @property
    def shares(self) -> list[float]:
        """How much each checkpoint counts; they add up to one."""
        return [share / math.fsum(self._shares) for share in self._shares]

    def _refuse_several_dtypes(self) -> None:
        for number, checkpoint in enumerate(self._checkpoints[1:], 2):
            for key, dtype in self.dtypes.items():
                if checkpoint.dtypes[key] != dtype:
                    first, other = dtype_text(dtype), dtype_text(checkpoint.dtypes[key])
                    raise ConversionError(
                        f"{key.name} is {first} in checkpoint 1 and {other} in {number}; choose one with --dtype"
                    )

    def read(self, key: Key, first: int, last: int) -> torch.Tensor:
        """Rows of the mean.

        Raises:
            ConversionError: a value is not finite, in a checkpoint or in the result's dtype.
            DamagedCheckpoint: a checkpoint cannot be read, or is not what it says.
        """
        shape = (last - first, *self._shapes[key.name][1:])
        out = torch.empty(shape, dtype=self.dtypes[key])
        step = max(1, _PIECE // math.prod(shape[1:]))
        for start in range(first, last, step):
            stop = min(start + step, last)
            out[start - first : stop - first] = self._mean(key, start, stop)
        return out

    def _mean(self, key: Key, first: int, last: int) -> torch.Tensor:
        total = self._checkpoints[0].read(key, first, last).double().mul_(self._shares[0])
        for checkpoint, share in zip(self._checkpoints[1:], self._shares[1:], strict=True):
            total.add_(checkpoint.read(key, first, last).double(), alpha=share)
        mean = total.div_(math.fsum(self._shares)).to(self.dtypes[key])
        if not mean.isfinite().all():
            raise ConversionError(
                f"{key.name}: rows [{first}, {last}) of the mean are not all finite in {dtype_text(mean.dtype)}; "
                "inspect_checkpoint.py --statistics says which checkpoint holds NaN or infinity"
            )
        return mean


def _checked(shares: Sequence[float] | None, count: int) -> Sequence[float]:
    if shares is None:
        return [1.0] * count
    if len(shares) != count:
        raise RequestError(f"--weights: there are {len(shares)} for {count} checkpoints; write one for each")
    for share in shares:
        if not (math.isfinite(share) and share > 0):
            raise RequestError(f"--weights: {share:g} is no weight of a mean; write numbers above 0")
    if not math.isfinite(math.fsum(shares)):
        raise RequestError("--weights: their sum is beyond a double; write smaller ones, only their ratios count")
    return list(shares)


def _refuse_other_model(one: Weights, other: Weights, number: int) -> None:
    differing = differing_settings(one.model, other.model)
    if differing:
        listing = "".join(f"\n  - {name}: {a} and {b}" for name, a, b in differing)
        raise ConversionError(f"checkpoints {number - 1} and {number} are not of one model:{listing}")
