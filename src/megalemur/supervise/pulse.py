"""What a rank and its supervisor tell each other without a system call: a page of shared memory.

The rank writes where it is, the supervisor that a stop was asked for. Both are on one machine and share its clock.
"""

import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple


class Section(IntEnum):
    """What a rank is doing."""

    SETUP = 0
    FIRST_STEPS = 1
    STEP = 2
    SAVE = 3
    VALIDATION = 4
    ENDING = 5

    @property
    def label(self) -> str:
        """As messages name it."""
        return self.name.lower().replace("_", " ")

    @property
    def is_slow(self) -> bool:
        """May take much longer than a step: loading, compiling, writing, validating."""
        return self not in (Section.STEP, Section.ENDING)


class Beat(NamedTuple):
    """The last sign of life of a rank."""

    section: Section
    steps: int
    """Steps taken since the beginning of the run."""
    age: float
    """Seconds since the sign."""


_FIRST = 2
"""Steps of a process that count as its first: buffers, kernels and connections are made in them."""


class Pulse:
    """Shared by a process and its forks. A beat costs three stores of eight bytes."""

    def __init__(self) -> None:
        self._fields = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
        self._begun = 0
        self._write(Section.SETUP, 0)
        self._fields[4] = threading.main_thread().ident or 0

    def _write(self, section: int, steps: int) -> None:
        # the time comes last: who reads in between sees a sign that is too old by one section, never too new
        self._fields[1], self._fields[2] = section, steps
        self._fields[0] = time.monotonic_ns()

    def step(self, steps: int) -> None:
        """Another step begins; `steps` were taken before it."""
        self._write(Section.STEP if self._begun >= _FIRST else Section.FIRST_STEPS, steps)
        self._begun += 1

    def enter(self, section: Section) -> None:
        """Something else than a step begins."""
        self._write(section, self._fields[2])

    @contextmanager
    def during(self, section: Section, steps: int) -> Iterator[None]:
        """Be in `section` after `steps` steps for the length of a block, then where this rank was before."""
        before = self._fields[1], self._fields[2]
        self._write(section, steps)
        try:
            yield
        finally:
            self._write(*before)

    def read(self) -> Beat:
        """Where the rank is."""
        age = (time.monotonic_ns() - self._fields[0]) / 1e9
        return Beat(Section(self._fields[1]), self._fields[2], max(0.0, age))

    def ask_to_stop(self) -> None:
        """Supervisor: the rank shall finish its step, save and leave."""
        self._fields[3] = 1

    @property
    def stop_asked(self) -> bool:
        """Rank: whether it shall."""
        return bool(self._fields[3])

    @property
    def main_thread(self) -> int:
        """The rank's main thread, as faulthandler names it; a fork keeps its parent's."""
        return self._fields[4]
