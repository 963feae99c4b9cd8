"""Records a window of steps with torch.profiler and leaves a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megalemur.config.log import ProfilerConfig
from megalemur.observe.observer import StepReport

_log = logging.getLogger(__name__)


class StepProfiler:
    """Records one window on this rank. Recorded steps are slower; the others cost nothing."""

    def __init__(self, window: ProfilerConfig, *, path: Path, first_step: int):
        """Begin at once where the window does.

        Args:
            window: start_step counts the steps taken before the first one recorded.
            path: of the trace.
            first_step: steps that the run has taken already.
        """
        self._window, self._path = window, path
        self._profile: Any = None
        if first_step > window.start_step:
            _log.warning(
                "log.profiler.start_step=%d has passed: the run begins at step %d; nothing is recorded",
                window.start_step,
                first_step,
            )
        self._move(first_step)

    def after_step(self, report: StepReport) -> None:
        """Begin or end the window."""
        self._move(report.step)

    def at_save(self, step: int, path: Path, seconds: float) -> None:
        """A save inside the window is recorded like everything else."""

    def at_end(self) -> None:
        """Write what was recorded of a window that the run's end cut short."""
        self._write()

    def _move(self, step: int) -> None:
        if step == self._window.start_step:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()
        elif step == self._window.start_step + self._window.steps:
            self._write()

    def _write(self) -> None:
        if self._profile is None:
            return
        finished, self._profile = self._profile, None
        finished.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:
            _log.warning("the profile cannot be written to %s: %s", self._path, error)
