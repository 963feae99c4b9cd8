"""A file with the step of the newest checkpoint, for a batch script that asks whether a restarted job got further."""

import logging
from pathlib import Path

from megalemur.observe.observer import StepReport

_log = logging.getLogger(__name__)


class Progress:
    """Writes the step at the start and at each save. A file that cannot be written never stops the run."""

    def __init__(self, path: Path, step: int):
        """Write the step from which the run goes on.

        Args:
            path: the file, replaced whole each time.
            step: of the checkpoint that was loaded; 0 at a start.
        """
        self._path = path
        self._write(step)

    def after_step(self, report: StepReport) -> None:
        """Only checkpoints count."""

    def at_save(self, step: int, path: Path, seconds: float) -> None:
        """Write the step."""
        self._write(step)

    def at_end(self) -> None:
        """Nothing to close."""

    def _write(self, step: int) -> None:
        new = self._path.with_name(f"{self._path.name}.tmp")
        try:
            new.write_text(f"{step}\n")
            new.replace(self._path)
        except OSError as error:
            _log.warning("%s could not be written: %s", self._path, error.strerror)
