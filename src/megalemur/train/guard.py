"""Whether an update may be applied: decided before anything is changed, from values that are equal on all ranks."""

import logging
import math
from enum import Enum

logger = logging.getLogger(__name__)


class Verdict(Enum):
    """What becomes of a step."""

    APPLY = "apply"
    SKIP = "skip"


class NumericalStop(RuntimeError):
    """Too many steps in a row without a finite loss and gradient norm."""


class FiniteGuard:
    """Skips a step whose loss or gradient norm is not finite; megatron-core's own step would write NaN."""

    def __init__(self, limit: int, skipped_in_a_row: int = 0):
        """Set up.

        Args:
            limit: skipped steps in a row after which the run stops.
            skipped_in_a_row: those before a restart.
        """
        self._limit = limit
        self._skipped_in_a_row = skipped_in_a_row

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """APPLY or SKIP.

        Raises:
            NumericalStop: `limit` steps in a row were skipped; raised on all ranks alike.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._skipped_in_a_row = 0
            return Verdict.APPLY
        self._skipped_in_a_row += 1
        logger.warning("step skipped: loss %s, gradient norm %s; no parameter was changed", loss, grad_norm)
        if self._skipped_in_a_row >= self._limit:
            raise NumericalStop(
                f"{self._skipped_in_a_row} steps in a row had a loss or gradient norm that is not finite "
                f"(last: loss {loss}, gradient norm {grad_norm}); lower optim.learning_rate or look at the data"
            )
        return Verdict.SKIP
