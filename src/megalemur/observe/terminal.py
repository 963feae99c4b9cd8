"""Records on the terminal: a progress bar where somebody looks, one line a record where it goes to a file."""

import math
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from megalemur.config.run import RunConfig
from megalemur.observe.meter import Record
from megalemur.observe.report import banner, ending


def summary_of(record: Record) -> str:
    """The few values of a record that a person watches."""
    parts = [
        f"loss {float(record['loss']):.4f}",
        f"norm {float(record['grad_norm']):.3g}",
        f"lr {float(record['learning_rate']):.2e}",
        f"{float(record['tokens_per_second']):,.0f} tokens/s",
    ]
    if "mfu_causal_attention" in record:
        parts.append(f"MFU {float(record['mfu_causal_attention']):.1%} causal")
    parts.append(f"ETA {timedelta(seconds=math.ceil(float(record['eta_seconds'])))}")
    if record["skipped"]:
        parts.append("SKIPPED")
    return "  ".join(parts)


def validation_of(record: Record) -> str:
    """Validation losses of a record; empty where there are none."""
    names = [name for name in record if name.startswith("validation/")]
    return "  ".join(f"{name} {float(record[name]):.4f}" for name in names)


class Terminal:
    """Prints the banner, then the records, and at the end a table of the last one."""

    def __init__(self, console: Console, config: RunConfig):
        """Print the banner.

        Args:
            console: shared with the log handler, so that neither writes over the other.
            config: the run.
        """
        console.print(banner(config))
        self._console, self._config = console, config
        self._started = time.monotonic()
        self._last: Record | None = None
        self._bar = _bar(console) if console.is_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task("…", total=config.last_step)
            self._bar.start()

    def write(self, record: Record) -> None:
        """Move the bar, or write a line at once."""
        self._last = record
        if self._bar is None:
            self._write_line(
                f"step {record['step']}/{self._config.last_step}", summary_of(record), validation_of(record)
            )
            return
        losses = validation_of(record)
        if losses:
            self._console.print(f"step {record['step']}  {losses}", highlight=False)
        self._bar.update(self._task, completed=float(record["step"]), description=summary_of(record), refresh=True)

    def tell(self, event: Record) -> None:
        """A line at once."""
        line = f"step {event['step']}  {str(event['event']).upper()}: {event['text']}"
        if self._bar is None:
            self._write_line(line)
        else:
            self._console.print(line, highlight=False, markup=False)

    def _write_line(self, *parts: str) -> None:
        """Past rich, which would wrap it at a width that nobody has."""
        self._console.file.write("  ".join(part for part in parts if part) + "\n")
        self._console.file.flush()

    def close(self) -> None:
        """Leave the bar as it is, give the terminal back, and print the table."""
        if self._bar is not None:
            self._bar.stop()
        if self._last is not None:
            seconds = time.monotonic() - self._started
            self._console.print(ending(self._last, seconds=seconds, directory=self._config.log.directory))


def _bar(console: Console) -> Progress:
    # on a narrow terminal the text wraps; the count and the bar keep their room
    text = TextColumn("{task.description}", table_column=Column(ratio=1))
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), text)
    # refreshed by the records alone: no thread that draws while the step computes
    return Progress(*columns, console=console, auto_refresh=False, expand=True)
