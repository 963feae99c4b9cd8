"""The rank as a process: forked, looked at through /proc, killed with everything below it."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_REAP_SECONDS = 1.0
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a device or file server (D)",
    "T": "stopped (T)",
    "t": "stopped by a debugger (t)",
    "Z": "dead (Z)",
}


def fork() -> int:
    """os.fork; the child has a session of its own and is killed with its parent. Returns 0 in the child.

    A session of its own: Ctrl-C of a terminal reaches the parent alone, which hands it on.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        end_with_parent(parent)
    return pid


def end_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends, however it ends. Linux only; elsewhere it stays without effect."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was quicker
        os._exit(1)


def state_of(pid: int) -> str:
    """The state of a process in words; empty where it cannot be seen."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return _STATES.get(text.rpartition(")")[2].split()[0], "")


def is_stopped(state: str) -> bool:
    """Whether `state_of` names a process that cannot run because somebody stopped it."""
    return state.startswith("stopped")


def descendants(pid: int) -> list[int]:
    """Every process below `pid`. Children that were adopted by init are not among them."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents.setdefault(int(entry.read_text().rpartition(")")[2].split()[1]), []).append(int(entry.parent.name))
    found, queue = [], [pid]
    while queue:
        below = parents.get(queue.pop(), [])
        found += below
        queue += below
    return found


class Child:
    """A forked rank, seen by its parent."""

    def __init__(self, pid: int):
        self.pid = pid
        self.code: int | None = None
        """Exit code, negative for a signal; None while it runs."""

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def kill(self) -> None:
        """SIGKILL it and everything below it; waits a moment for it to be gone."""
        if self.poll() is not None:
            return
        for pid in [*descendants(self.pid), self.pid]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _REAP_SECONDS
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
