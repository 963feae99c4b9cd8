"""How a command ends that cannot do what was asked: one line of error on stderr, and an exit code of its kind."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

DONE, WRONG, DIFFERENT, DAMAGED = 0, 1, 3, 13
"""Done, or equal; something that the user can change (2: no such option, typer's own); not equal; a checkpoint that is
not what it says or what was written, or whose files do not fit together, as a run ends with where it finds one."""


@contextmanager
def errors_said() -> Iterator[None]:
    """Turn an error into a line on stderr and an exit code.

    Raises:
        typer.Exit: with that code.
    """
    from checkpoints_tools.errors import CertificateError, ConversionError, UnfitSource
    from megalemur.checkpoint.errors import CheckpointError

    said: Exception
    try:
        yield
    except UnfitSource as error:
        code, said = DAMAGED, error
    except (ConversionError, ValueError, OSError) as error:
        code, said = WRONG, error
    except CertificateError as error:
        code, said = DIFFERENT, error
    except CheckpointError as error:
        code, said = DAMAGED, error
    else:
        return
    typer.echo(f"error: {said}", err=True)
    raise typer.Exit(code)
