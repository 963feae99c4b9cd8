"""Python's garbage collector, run by all ranks at the same step instead of by each at its own: a rank that pauses alone
makes all others wait for it.
"""

import gc
from pathlib import Path

from megalemur.observe.observer import StepReport


class AlignedGarbageCollection:
    """Turns automatic collection off until the run ends.

    Young objects are collected every few steps (milliseconds); everything at each save, when training stands still
    anyway. What is there at the beginning (modules, the model) is set aside: it lives as long as the run, and to walk
    through it at each save took 0.3 s.
    """

    def __init__(self, every: int):
        """Collect once, set aside what is left, and turn automatic collection off.

        Args:
            every: steps between collections.
        """
        self._every = every
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()

    def after_step(self, report: StepReport) -> None:
        """Collect generations 0 and 1 when due."""
        if report.step % self._every == 0:
            gc.collect(1)

    def at_save(self, step: int, path: Path, seconds: float) -> None:
        """Collect everything that came since the beginning."""
        gc.collect()

    def at_end(self) -> None:
        """Give collection back to Python, and what was set aside to it."""
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
