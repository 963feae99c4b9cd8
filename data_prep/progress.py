"""How far a build is: a bar where somebody looks, a line now and then where it goes to a file."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LINE_SECONDS = 30.0


class BuildProgress:
    """Counts what workers finish. A context manager."""

    def __init__(self, console: Console, total_bytes: int, done_bytes: int):
        """Begin.

        Args:
            console: where it goes.
            total_bytes: stored bytes of the input; 0 where nobody knows.
            done_bytes: what an earlier run did.
        """
        self._console = console
        self._total, self._done = total_bytes, done_bytes
        self.documents = self.tokens = self.bad = 0
        self._text_bytes = 0
        self._began = self._said = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(20), DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self._task: TaskID = self._bar.add_task("…", total=total_bytes or None, completed=done_bytes)

    def __enter__(self) -> "BuildProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, *, stored_bytes: int, text_bytes: int, documents: int, tokens: int, bad: int) -> None:
        """A unit is done."""
        self._done += stored_bytes
        self._text_bytes += text_bytes
        self.documents += documents
        self.tokens += tokens
        self.bad += bad
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=self._rates())
        elif time.monotonic() - self._said > _LINE_SECONDS:
            self._said = time.monotonic()
            share = f"{self._done / self._total:.1%}  " if self._total else ""
            self._console.print(f"{share}{self._rates()}", highlight=False)

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-3)
        bad = f"  {self.bad:,} bad" if self.bad else ""
        return (
            f"{self.documents / seconds:,.0f} documents/s  {self._text_bytes / seconds / 1e6:,.1f} MB/s of text  "
            f"{self.tokens / seconds:,.0f} tokens/s{bad}"
        )
