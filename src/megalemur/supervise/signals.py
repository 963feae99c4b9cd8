"""Signals that ask a run to stop: SIGTERM, SIGINT, SIGUSR1, SIGUSR2. The first one saves, a second one ends at once.

Launchers, terminals and batch systems may deliver one request to a whole process group and hand it on besides, so a
rank and its supervisor hear it once or several times: what arrives within `SAME_SECONDS` is one request.
"""

import os
import signal
import time
from types import FrameType

from megalemur.supervise.pulse import Pulse

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
SAME_SECONDS = 2.0
"""Signals no further apart than this from the first are one request."""


class StopRequest:
    """In the rank: a stop signal that it heard itself, or its supervisor did, or a deadline that has passed.

    Listens inside its `with` block.
    """

    def __init__(self, pulse: Pulse | None = None, *, wakeup: int = -1, deadline: float | None = None):
        """Set up.

        Args:
            pulse: shared with the supervisor; None without one.
            wakeup: descriptor that gets a byte a signal even while the process is deep in a collective; -1: none.
            deadline: when to stop without a signal, in seconds since 1970; None: never.
        """
        self._pulse = pulse or Pulse()
        self._wakeup = wakeup
        self.deadline = deadline

    @property
    def heard(self) -> bool:
        """Whether this rank was asked to stop, or its time is up."""
        return self._pulse.stop_asked or (self.deadline is not None and time.time() >= self.deadline)

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._hear) for number in STOP_SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._pulse.ask_to_stop()


class Heard:
    """In the supervisor: counts requests, its own and those that its rank heard."""

    def __init__(self) -> None:
        self.requests = 0
        self.names: list[str] = []
        """Of the signals that counted."""
        self._last_request = 0.0
        self._waiting: list[int] = []
        self._reader, self.wakeup = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self.wakeup, False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: self._waiting.append(number))

    def leave_to_rank(self) -> None:
        """After the fork, in the supervisor: the writing end is the rank's."""
        os.close(self.wakeup)

    def count(self) -> int:
        """Requests until now."""
        try:
            from_rank = list(os.read(self._reader, 4096))
        except BlockingIOError:
            from_rank = []
        here, self._waiting = self._waiting, []
        numbers = [number for number in here + from_rank if number in STOP_SIGNALS]
        now = time.monotonic()
        if numbers and (not self.requests or now - self._last_request > SAME_SECONDS):
            self.requests += 1
            self.names.append(signal.Signals(numbers[0]).name)
            self._last_request = now
        return self.requests
