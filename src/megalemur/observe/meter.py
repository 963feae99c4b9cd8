"""Gathers what steps report and makes the records that sinks write. Owns no collective and no torch: values of other
ranks arrive in the report.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone

from megalemur.observe.observer import Event, StepReport
from megalemur.observe.throughput import FlopsPerToken, utilisation

Record = dict[str, bool | int | float | str]
"""One line of metrics: flat, `validation/NAME` and the like for what each source has. What is unknown is absent."""


@dataclass(frozen=True)
class Work:
    """What the run has to do, and with what."""

    devices: int
    """Processes of the run, one device each."""
    sequence_length: int
    """Tokens a sample."""
    last_step: int
    """Step at which the run ends or pauses."""
    flops: FlopsPerToken
    peak_teraflops: float | None = None
    """TFLOP/s of one device; None: unknown, and utilisation is not reported."""
    epoch_samples: Mapping[str, int] = field(default_factory=dict)
    """Samples in one epoch of each source; epochs are reported for these."""


@dataclass
class _Window:
    """Sums since the last record."""

    tokens: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    save_seconds: float = 0.0
    save_write_seconds: float = 0.0


class Meter:
    """One rank's account of the run, from the process' first step on."""

    def __init__(
        self,
        work: Work,
        *,
        device_facts: Callable[[], Mapping[str, float | int]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Begin to count.

        Args:
            work: what the run has to do.
            device_facts: further values of this rank's device, asked at each record.
            clock: monotonic seconds; also counts validation and saving.
        """
        self._work = work
        self._device_facts, self._clock = device_facts, clock
        self._window = _Window()
        self._skipped_steps = self._failed_saves = 0
        self._steps_since = 0
        self._settled: float | None = None

    def add(self, report: StepReport) -> None:
        """Count a step."""
        if self._settled is None:
            # the first step also pays for allocations and compilation: the pace is taken from its end on
            self._settled = self._clock()
        else:
            self._steps_since += 1  # counted: the number of a step goes back at a rollback
        window = self._window
        window.tokens += report.tokens
        window.seconds += report.seconds
        window.data_seconds += report.data_seconds
        window.save_write_seconds += report.save_write_seconds
        self._skipped_steps += report.skipped
        self._failed_saves += report.failed_saves

    def add_save(self, seconds: float) -> None:
        """Count the time for which training stood still to save."""
        self._window.save_seconds += seconds

    def record(self, report: StepReport) -> Record:
        """Everything about the last step that was added and the window since the last record.

        Rates are those of the window's steps; validation and saving are left out of them and part of `eta_seconds`.
        `data_seconds`, `save_seconds` (training stood still) and `save_write_seconds` (saves from beginning to end) are
        sums over the window; `skipped_steps` and `failed_saves` count from the process' start.
        """
        window, self._window = self._window, _Window()
        record: Record = {
            "step": report.step,
            "time": _now(),
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "skipped": report.skipped,
            "skipped_steps": self._skipped_steps,
            **self._rates(window),
            "step_seconds": report.seconds,
            **_spread(report),
            "data_seconds": window.data_seconds,
            "samples": report.samples,
            "tokens": report.samples * self._work.sequence_length,
            "eta_seconds": self._eta_seconds(report),
            **self._device_facts(),
            **self._sources(report),
        }
        if window.save_seconds:
            record["save_seconds"] = window.save_seconds
        if window.save_write_seconds:
            record["save_write_seconds"] = window.save_write_seconds
        if self._failed_saves:
            record["failed_saves"] = self._failed_saves
        return record

    def _rates(self, window: _Window) -> Record:
        work = self._work
        rate = window.tokens / max(window.seconds, 1e-9)
        rates: Record = {"tokens_per_second": rate, "tokens_per_second_per_device": rate / work.devices}
        if work.peak_teraflops is not None:
            for convention, flops in work.flops._asdict().items():
                rates[f"mfu_{convention}"] = utilisation(
                    rate, flops, devices=work.devices, peak_teraflops=work.peak_teraflops
                )
        return rates

    def _eta_seconds(self, report: StepReport) -> float:
        assert self._settled is not None, "add the step before its record"
        pace = (self._clock() - self._settled) / self._steps_since if self._steps_since else report.seconds
        return max(0, self._work.last_step - report.step) * pace

    def _sources(self, report: StepReport) -> Record:
        values: Record = {f"samples/{name}": count for name, count in report.ledger.items()}
        values |= {
            f"epochs/{name}": report.ledger[name] / size
            for name, size in self._work.epoch_samples.items()
            if name in report.ledger
        }
        return values | {f"validation/{name}": loss for name, loss in report.validation.items()}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def event_record(step: int, event: Event) -> Record:
    """An event as one flat line; `event` tells it from a record of measurements."""
    return {"step": step, "time": _now(), "event": event.kind, "text": event.text, **event.facts}


def _spread(report: StepReport) -> Record:
    """Seconds until each rank's gradients were ready, over the ranks; the slowest is named."""
    seconds = report.rank_seconds
    if not seconds:
        return {}
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return {
        "rank_seconds_min": min(seconds),
        "rank_seconds_mean": sum(seconds) / len(seconds),
        "rank_seconds_max": seconds[slowest],
        "slowest_rank": slowest,
    }
