"""How a command ends that cannot do what was asked: one line of error on stderr, and an exit code of its kind."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from data_prep.errors import DiskError, PrepError
from megalemur.data.errors import DataError

WRONG, DAMAGED = 1, 12
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@contextmanager
def errors_said(kept: str = "nothing half-made is left") -> Iterator[None]:
    """Turn an error into a line on stderr and an exit code, as docs/data.md lists them.

    Args:
        kept: what becomes of the work that was done, for whoever met a full disk.

    Raises:
        typer.Exit: with that code.
    """
    try:
        yield
    except (PrepError, ValueError, DataError, OSError) as error:
        typer.echo(f"error: {message_of(error, kept)}", err=True)
        raise typer.Exit(code_of(error)) from None


def code_of(error: Exception) -> int:
    """The exit code of an error."""
    if isinstance(error, PrepError):
        return error.code
    if isinstance(error, DataError):
        return DAMAGED
    return DiskError.code if isinstance(error, OSError) and not isinstance(error, _NOT_THERE) else WRONG


def message_of(error: Exception, kept: str) -> str:
    """What is said; the system's own words for a full disk name no file and no way out."""
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return str(error)
    where = f"{error.filename}: " if error.filename else "a file of the output: "
    return f"{where}{error.strerror}; make room and run the same command again: {kept}"
