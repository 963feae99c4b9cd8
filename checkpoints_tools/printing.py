"""How checkpoints are shown to people: sizes, numbers, tables, and text of files that may not steer the terminal."""

import re
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_UNITS = ("B", "kB", "MB", "GB", "TB")


def visible(text: str) -> str:
    """The text with control characters written as escapes: they would steer the terminal, or turn the text around."""
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def size_text(size: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    power = 0
    while size >= 1000 and power < len(_UNITS) - 1:
        size, power = size / 1000, power + 1
    return f"{size:.0f} B" if power == 0 else f"{size:.2f} {_UNITS[power]}"


def counted(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def dtype_text(dtype: object) -> str:
    """A torch dtype's name alone."""
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Sequence[int]) -> str:
    """Rows and columns."""
    return " × ".join(f"{extent}" for extent in shape)


def facts_table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    """Names and values below a title."""
    table = Table(title=Text(visible(title)), title_justify="left", title_style="bold", show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(visible(name)), Text(visible(value)))
    return table


def plain(text: str, style: str = "") -> Text:
    """A line of text that is no markup and is not highlighted."""
    return Text(visible(text), style=style)
