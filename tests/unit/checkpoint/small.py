"""Checkpoints without tensors, made by the code that commits real ones, and kills at chosen effects on the disk."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalemur.checkpoint import disk
from megalemur.checkpoint.draft import open_draft, sweep
from megalemur.checkpoint.manifest import Manifest, dump_manifest
from megalemur.checkpoint.tensor_file import write_bytes

EFFECTS = (
    "make_directory",
    "create",
    "write",
    "sync",
    "close",
    "sync_directory",
    "rename",
    "unlink",
    "remove_directory",
)


def write_small(root: Path, step: int, *, text: bytes = b"text") -> Path:
    """Commit a checkpoint of two files: one of the weights' part, one of the trainer's."""
    sweep(root)
    draft = open_draft(root, step)
    files = {"config.json": text, "trainer/state.json": b"{}" + text}
    entries = {name: write_bytes(draft.path / name, data) for name, data in files.items()}
    return draft.commit(dump_manifest(Manifest(step, {}, entries, {}, {})))


def in_a_child(work: Callable[[], Any]) -> int:
    """Exit code of a forked process that does the work: 0, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_before_effect(number: int, work: Callable[[], Any]) -> int:
    """Do the work in a process that is killed right before its `number`-th effect on the disk, counted from 1."""
    return in_a_child(lambda: _counted(number, work))


def _counted(number: int, work: Callable[[], Any]) -> None:
    kill_at_effect(number)
    work()


def kill_at_effect(number: int, *, behind: bool = False) -> None:
    """From now on, end this process right before its `number`-th effect on the disk, or behind it."""
    left = number

    def killing(effect: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not behind:
                os.kill(os.getpid(), signal.SIGKILL)
            found = effect(*arguments)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return run

    for name in EFFECTS:
        setattr(disk, name, killing(getattr(disk, name)))
