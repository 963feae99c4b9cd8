"""Where a rank stands: its Python stacks, written by faulthandler when its supervisor asks for them.

Into an unnamed file on the local disk: a rank that hangs may do so because the shared file system does.
"""

import faulthandler
import linecache
import os
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megalemur.supervise.process import end_with_parent

# a real-time signal on Linux: no library waits for it, and it does not end a `read` early for a C library that minds
SIGNAL = signal.SIGRTMIN + 9 if hasattr(signal, "SIGRTMIN") else signal.SIGXCPU
ANSWER_SECONDS = 1.0
"""How long a rank has to write its stacks: a stopped one never does."""
_KEEP_SECONDS = 1.0
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
_WAITING_CALL = re.compile(r"\.wait\(")
_COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"


class Frame(NamedTuple):
    """One line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        name = Path(self.file)
        return f"{self.function} ({name.parent.name}/{name.name}:{self.line})"


class Stacks:
    """The file that rank and supervisor share."""

    def __init__(self) -> None:
        # buffering is no matter: faulthandler and os.pread use the descriptor
        self._file = tempfile.TemporaryFile()  # noqa: SIM115

    def listen(self) -> None:
        """In the rank: write all threads' stacks whenever SIGNAL comes, even inside a collective."""
        faulthandler.register(SIGNAL, file=self._file, all_threads=True)

    def ask(self, pid: int) -> str:
        """In the supervisor: the stacks as they are now; empty when the rank cannot answer."""
        before = self._size()
        try:
            os.kill(pid, SIGNAL)
        except ProcessLookupError:
            return ""
        deadline, size = time.monotonic() + ANSWER_SECONDS, before
        while time.monotonic() < deadline:
            time.sleep(0.05)
            last, size = size, self._size()
            if size > before and size == last:
                break
        return os.pread(self._file.fileno(), size - before, before).decode(errors="replace")

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size


def frames_of(text: str, thread: int) -> list[Frame]:
    """Frames of one thread, innermost first.

    Args:
        text: as faulthandler writes it.
        thread: identity of the thread.
    """
    for part in text.split("\n\n"):
        if re.match(rf"(?:Current thread|Thread) 0x0*{thread:x} ", part):
            return [Frame(file, int(line), function) for file, line, function in _FRAME.findall(part)]
    return []


def waits_for_others(frames: Sequence[Frame]) -> bool:
    """Whether the innermost frame is a collective's or waits for a message of another rank."""
    if not frames:
        return False
    top = frames[0]
    return _COLLECTIVES in top.file or bool(_WAITING_CALL.search(linecache.getline(top.file, top.line)))


def place_in(frames: Sequence[Frame], package: str = "megalemur") -> Frame | None:
    """The innermost frame of our own code: the section that a reader knows."""
    inside = f"{os.sep}{package}{os.sep}"
    return next((frame for frame in frames if inside in frame.file), frames[0] if frames else None)


def keep(text: str, path: Path) -> None:
    """Write the stacks of this rank where a user finds them, unless the file system does not answer in time."""
    parent = os.getpid()
    pid = os.fork()  # a write that never returns must not hold the supervisor
    if pid == 0:
        try:
            end_with_parent(parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        finally:
            os._exit(0)
    deadline = time.monotonic() + _KEEP_SECONDS
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.01)
