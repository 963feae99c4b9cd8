"""Keeps a run from starting again and again without getting anywhere. One small file beside the checkpoints."""

import logging
import os
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megalemur.config.strict_json import canonical_json, parse_json
from megalemur.parallel.groups import Place

_log = logging.getLogger(__name__)

STARTS = "starts.jsonl"
"""One line a start: step, seconds since 1970, host of rank 0."""
MOST_STARTS = 3
"""Starts in a row from one step, after which another one is refused."""


class CrashLoop(RuntimeError):
    """The run started from the same step too often. Raised on every rank alike."""


def refuse_crash_loop(directory: Path, step: int, place: Place) -> None:
    """Note this start, or refuse it. A collective of one number.

    Args:
        directory: of the checkpoints.
        step: from which the run goes on; it grows whenever a checkpoint was committed in between.
        place: of this rank; rank 0 alone reads and writes.

    Raises:
        CrashLoop: the last MOST_STARTS starts were all from this step.
    """
    starts = torch.zeros(1, dtype=torch.int64)
    if place.rank == 0:
        starts[0] = starts_in_a_row(directory / STARTS, step)
        if starts[0] < MOST_STARTS:
            _note(directory / STARTS, step)
    dist.broadcast(starts, src=0, group=place.cpu_group)
    if starts[0] >= MOST_STARTS:
        raise CrashLoop(
            f"the last {int(starts[0])} starts were all from step {step}, and none got to another checkpoint; see "
            f"why in their logs, mend it, and delete {directory / STARTS} to start again"
        )


def starts_in_a_row(path: Path, step: int) -> int:
    """How many of the newest starts were from `step`. Lines that make no sense are passed over: a torn one is old."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return 0
    count = 0
    for line in reversed(lines):
        try:
            start = parse_json(line)
        except ValueError:
            continue
        if not isinstance(start, dict) or not isinstance(start.get("step"), int):
            continue
        if start["step"] != step:
            break
        count += 1
    return count


def _note(path: Path, step: int) -> None:
    """Append this start; a disk that is full is not this file's business."""
    line = canonical_json({"step": step, "time": round(time.time(), 3), "host": socket.gethostname()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            # behind a torn line, a new one
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write((b"\n" if torn else b"") + line + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        _log.warning("this start could not be noted in %s: %s", path, error.strerror)
