"""How a command ends that cannot do what was asked: an error on stderr, and an exit code of its kind.

The numbers are those of the command `megalemur`, where it has one for the same thing. Free of torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from checkpoints_tools.errors import CertificateError, RequestError
from megalemur.checkpoint.errors import CheckpointError

WRONG = 11
"""Something that a user wrote cannot be used. An option that does not exist ends with 2, typer's own code."""
DAMAGED = 13
"""A checkpoint cannot be read or written, or is not what its format says."""
DIFFERENT = 20
"""Two checkpoints differ, or differ by more than the bounds allow."""


@contextmanager
def errors_said() -> Iterator[None]:
    """Turn an error that a user can mend into a message on stderr and an exit code; others keep their traceback.

    Raises:
        typer.Exit: with that code.
    """
    try:
        yield
    except (CheckpointError, RequestError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(code_of(error)) from None


def code_of(error: Exception) -> int:
    """The exit code of an error."""
    if isinstance(error, CertificateError):
        return DIFFERENT
    return WRONG if isinstance(error, RequestError) else DAMAGED
