"""The observer that turns steps into records and hands them to the sinks. Lives on rank 0."""

from collections.abc import Sequence
from pathlib import Path

from megalemur.observe.meter import Meter, event_record
from megalemur.observe.observer import StepReport
from megalemur.observe.sinks import Sink


class Metrics:
    """Writes a record every few steps, at each validation and at the last step."""

    def __init__(self, meter: Meter, sinks: Sequence[Sink], *, every: int, last_step: int):
        """Hold on to the parts.

        Args:
            meter: counts.
            sinks: take the records; they must not raise.
            every: steps between records.
            last_step: step that is always recorded.
        """
        self._meter, self._sinks = meter, sinks
        self._every, self._last_step = every, last_step

    def after_step(self, report: StepReport) -> None:
        """Count the step, tell its events, and write a record when due."""
        self._meter.add(report)
        for event in report.events:
            for sink in self._sinks:
                sink.tell(event_record(report.step, event))
        if report.step % self._every and report.step != self._last_step and not report.validation:
            return
        record = self._meter.record(report)
        for sink in self._sinks:
            sink.write(record)

    def at_save(self, step: int, path: Path, seconds: float) -> None:
        """Count the pause; the next record carries it."""
        self._meter.add_save(seconds)

    def at_end(self) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()
