"""Where records go: JSON lines and TensorBoard, each behind a guard: a full disk costs metrics, not the run."""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import orjson

from megalemur.observe.meter import Record

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes records, in the order of their steps."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def tell(self, event: Record) -> None:
        """Take an event: `step`, `event`, `text` and facts."""

    def close(self) -> None:
        """Everything is written."""


class JsonLines:
    """One JSON object a line, handed to the operating system before `write` returns; NaN and infinity are null.

    A resumed run appends: steps that it repeats are there twice, and its first record says so in `resumed_from`.
    """

    def __init__(self, path: Path, *, resumed_from: int | None = None):
        """Open for appending.

        Args:
            path: file; its directory is created.
            resumed_from: step that this run resumes at; None: a new run.

        Raises:
            OSError: it cannot be opened.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._resumed_from = path, resumed_from
        self._file = path.open("ab", buffering=0)
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        """A process that was killed in mid-write leaves half a line: the next one must not be glued to it."""
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    self._append(b"\n")

    def write(self, record: Record) -> None:
        """Append one line, or nothing.

        Raises:
            OSError: the disk is full, or gone.
        """
        marked = record if self._resumed_from is None else {**record, "resumed_from": self._resumed_from}
        self._append(orjson.dumps(marked, option=orjson.OPT_APPEND_NEWLINE))
        self._resumed_from = None

    def tell(self, event: Record) -> None:
        """Append one line, as `write`."""
        self.write(event)

    def _append(self, line: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(f"{self._path}: only part of a line could be written")
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Every number of a record as a scalar over steps; steps that a resumed run repeats hide the old ones."""

    def __init__(self, directory: Path, *, resumed_from: int | None = None):
        """Open an event file; imports tensorboard.

        Args:
            directory: of the event files.
            resumed_from: step that this run resumes at; None: a new run.
        """
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_from is None else resumed_from + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge)

    def write(self, record: Record) -> None:
        """Add one record; events reach the disk within two minutes or at `close`."""
        step = record["step"]
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, step)

    def tell(self, event: Record) -> None:
        """Add the text."""
        self._writer.add_text(f"event/{event['event']}", str(event["text"]), event["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Guarded:
    """A sink that never raises: it warns once, drops what it cannot write, and says when writing works again."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]):
        """Open the sink, or warn; a sink that did not open is tried again at each record.

        Args:
            name: what a warning calls it.
            open_sink: opens it.
        """
        self._name, self._open_sink = name, open_sink
        self._sink: Sink | None = None
        self._lost = 0
        try:
            self._sink = open_sink()
        except Exception as error:
            _log.warning("%s cannot be opened: %s; training goes on without it", name, error)

    def write(self, record: Record) -> None:
        """Write the record, or lose it."""
        self._try(lambda sink: sink.write(record))

    def tell(self, event: Record) -> None:
        """Write the event, or lose it."""
        self._try(lambda sink: sink.tell(event))

    def _try(self, use: Callable[[Sink], None]) -> None:
        try:
            if self._sink is None:
                self._sink = self._open_sink()
            use(self._sink)
        except Exception as error:
            if not self._lost:
                _log.warning("%s cannot be written: %s; training goes on, records are lost", self._name, error)
            self._lost += 1
            return
        if self._lost:
            _log.warning("%s can be written again; %d records were lost", self._name, self._lost)
            self._lost = 0

    def close(self) -> None:
        """Close the sink, or warn."""
        try:
            if self._sink is not None:
                self._sink.close()
        except Exception as error:
            _log.warning("%s cannot be closed: %s; its last records may be lost", self._name, error)
