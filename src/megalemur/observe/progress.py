"""A file with the step of the newest checkpoint, for a batch script that asks whether a restarted job got further."""

import logging
from collections.abc import Callable
from pathlib import Path

from megalemur.observe.observer import StepReport

_log = logging.getLogger(__name__)


class Progress:
    """Keeps the file up to date. One that cannot be written never stops the run."""

    def __init__(self, path: Path, standing: Callable[[], int]):
        """Write the step from which the run goes on.

        Args:
            path: the file, replaced whole each time.
            standing: step of the newest checkpoint that stands; saves in flight do not count. 0: none.
        """
        self._path, self._standing = path, standing
        self._written: int | None = None
        self._update()

    def after_step(self, report: StepReport) -> None:
        """A save in the background may have come to its end."""
        self._update()

    def at_save(self, step: int, path: Path, seconds: float) -> None:
        """It has only begun."""

    def at_end(self) -> None:
        """The last save stands."""
        self._update()

    def _update(self) -> None:
        step = self._standing()
        if step == self._written:
            return
        self._written = step
        new = self._path.with_name(f"{self._path.name}.tmp")
        try:
            new.write_text(f"{step}\n")
            new.replace(self._path)
        except OSError as error:
            _log.warning("%s could not be written: %s", self._path, error.strerror)
