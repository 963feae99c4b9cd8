"""How far a conversion is: a bar with bytes, rate and time left where somebody looks, else a line now and then."""

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from checkpoints_tools.mover import Progress

_LINE_SECONDS = 30.0


class Stages:
    """One bar a stage. A context manager."""

    def __init__(self, console: Console):
        self._console, self._lock = console, threading.Lock()
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description:>9}"), BarColumn(30), DownloadColumn(), TransferSpeedColumn())
            self._bar = Bar(*columns, TimeRemainingColumn(), console=console)

    def __enter__(self) -> "Stages":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, stage: str, total: int) -> Progress:
        """A stage of so many bytes; what to call as they are dealt with, from any thread."""
        if self._bar is None:
            return self._lines(stage, total)
        bar, task = self._bar, self._bar.add_task(stage, total=total)
        return lambda count: bar.advance(task, count)

    def _lines(self, stage: str, total: int) -> Progress:
        done, began = 0, time.monotonic()
        said = began

        def advance(count: int) -> None:
            nonlocal done, said
            with self._lock:
                done += count
                now = time.monotonic()
                if now - said >= _LINE_SECONDS:
                    said, rate = now, done / max(now - began, 1e-9)
                    left = (total - done) / max(rate, 1.0)
                    self._console.print(
                        f"{stage}: {done / 1e9:,.1f} of {total / 1e9:,.1f} GB, {rate / 1e9:.2f} GB/s, {left:.0f} s left"
                    )

        return advance
