"""Puts what was measured beside what was planned: in every record, and once in the log."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from megalemur.observe.expectation import Expectation
from megalemur.observe.observer import StepReport

_log = logging.getLogger(__name__)

FIRST, LAST = 11, 20
"""Steps of this process that are judged; the ones before compile and fill caches."""
TOLERANCE = 0.10
"""A larger difference from the plan, as a share of it, is a warning."""


class AgainstPlan:
    """Lives on rank 0; memory of the other ranks arrives in the report."""

    def __init__(self, expectation: Expectation, *, stages: int):
        """Hold on to the plan.

        Args:
            expectation: the plan's figures.
            stages: pipeline stages; the ranks of a stage follow each other.
        """
        self._plan, self._stages, self._taken = expectation, stages, 0
        self._seconds: deque[float] = deque(maxlen=LAST - FIRST + 1)
        self._peaks: list[int] = []

    def facts(self) -> Mapping[str, float | int]:
        """For the metrics, from the first judged step on: `plan/...` and the measured figures beside them."""
        if not self._seconds:
            return {}
        measured = median(self._seconds)
        found: dict[str, float | int] = {
            "plan/step_seconds": self._plan.step_seconds,
            "plan/step_ratio": measured / self._plan.step_seconds,
        }
        for stage, (planned, peak) in enumerate(zip(self._plan.peak_bytes, self._peaks, strict=False)):
            found[f"plan/peak_bytes_stage_{stage}"] = planned
            found[f"peak_bytes_stage_{stage}"] = peak
        return found

    def after_step(self, report: StepReport) -> None:
        """Count the step; judge at the last of those that are judged."""
        self._taken += 1
        self._peaks = _by_stage(report.peak_bytes, self._stages) or self._peaks
        if self._taken >= FIRST:
            self._seconds.append(report.seconds)
        if self._taken == LAST:
            self._judge()

    def _judge(self) -> None:
        plan = self._plan
        _compare(f"a step on {plan.cluster}", median(self._seconds), plan.step_seconds, "s")
        for stage, (planned, peak) in enumerate(zip(plan.peak_bytes, self._peaks, strict=False)):
            _compare(f"memory of stage {stage} on {plan.cluster}", peak / 2**30, planned / 2**30, "GiB")

    def at_save(self, step: int, path: Path, seconds: float) -> None:
        """Saves are left out."""

    def at_end(self) -> None:
        """Nothing to close."""


def _by_stage(peaks: Sequence[int], stages: int) -> list[int]:
    """The largest peak of each stage; empty where none was gathered."""
    each = len(peaks) // stages
    return [max(peaks[stage * each : (stage + 1) * each]) for stage in range(stages)] if each else []


def _compare(what: str, measured: float, planned: float, unit: str) -> None:
    difference = measured / planned - 1
    level = logging.WARNING if abs(difference) > TOLERANCE else logging.INFO
    _log.log(level, "%s: %.4g %s measured, %.4g planned (%+.0f %%)", what, measured, unit, planned, 100 * difference)
