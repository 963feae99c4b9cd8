"""Turns the errors that a user can mend into one message and an exit code; everything else keeps its traceback."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from megalemur.cli import exit_codes


def code_of(error: Exception) -> int | None:
    """The exit code of an error that a user can mend, or None. Told by name: their modules may not be loaded."""
    codes = {
        "DataError": exit_codes.BAD_DATA,
        "CheckpointError": exit_codes.NO_GOOD_CHECKPOINT,
        "NumericalStop": exit_codes.NUMERICAL_STOP,
        "RunHung": exit_codes.HANG,
        "CrashLoop": exit_codes.CRASH_LOOP,
        "RankDied": exit_codes.RANK_DIED,
        "StoppedTwice": exit_codes.STOPPED_TWICE,
        "ReplicaError": exit_codes.REPLICAS_DIFFER,
        "ValueError": exit_codes.BAD_CONFIG,
    }
    if not _is_ours(error):
        return None
    return next((codes[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in codes), None)


def _is_ours(error: Exception) -> bool:
    """Raised by our own code: a ValueError out of a library is a mistake of ours, and its traceback is wanted."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__", "").split(".")[0] == "megalemur"


def text_for(rank: int, error: Exception) -> str:
    """The whole message on rank 0, its first line on the others."""
    text = str(error) or type(error).__name__
    return text if rank == 0 else f"rank {rank}: {text.splitlines()[0]}"


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Print such an error and exit with its code. All ranks raise it: rank 0 prints it whole, the others one line."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            code = code_of(error)
            if code is None:
                raise
            rank = int(os.environ.get("RANK", "0"))
            print(f"megalemur: {text_for(rank, error)}", file=sys.stderr)  # noqa: T201
            sys.exit(code)

    return wrapper
