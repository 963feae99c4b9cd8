"""Forks a rank and stays beside it until the run ends: what `megalemur train` does before it trains."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megalemur.config.run import RunConfig
from megalemur.supervise.deadline import deadline
from megalemur.supervise.endings import Ending
from megalemur.supervise.hub import DUMP
from megalemur.supervise.office import Office, Pauses, Setting, open_office
from megalemur.supervise.process import Child, fork, is_stopped, state_of
from megalemur.supervise.pulse import Pulse, Section
from megalemur.supervise.signals import SAME_SECONDS, STOP_SIGNALS, Heard, StopRequest
from megalemur.supervise.stacks import Stacks, frames_of, keep, place_in, waits_for_others

_POLL_SECONDS = 0.1
_STATUS_SECONDS = 1.0

Work = Callable[[RunConfig, StopRequest, Pulse], int]


def supervised(config: RunConfig, work: Work, *, requeue: int) -> int:
    """Do `work` in a fork and supervise it; returns in both processes, each with the exit code that is to be its own.

    Must be called before anything starts a thread or opens a device.

    Args:
        config: the run.
        work: what a rank does; gets the config, the request to stop and the pulse, and returns its exit code.
        requeue: the exit code of a rank that was asked to stop and saved.

    Raises:
        RunHung, RankDied, StoppedTwice: in the supervisor.
        ValueError: in the supervisor: the environment makes no sense, or the port cannot be used.
        what `work` raises: in the rank.
    """
    setting = Setting.from_environment()
    pulse, stacks, heard = Pulse(), Stacks(), Heard()
    # held back until both sides listen, so that none is heard by a copy of the other's ear
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    pid = fork()
    if pid == 0:
        stacks.listen()
        with StopRequest(pulse, wakeup=heard.wakeup, deadline=deadline(config.run.stop_before)) as stop:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            return work(config, stop, pulse)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    heard.leave_to_rank()
    child = Child(pid)
    try:
        hub = open_office(config, setting, requeue)
        return Supervisor(config, setting, Rank(child, pulse, stacks, heard), hub).run().finish()
    finally:
        child.kill()


@dataclass(frozen=True)
class Rank:
    """A forked rank and what it shares with its supervisor."""

    child: Child
    pulse: Pulse
    stacks: Stacks
    heard: Heard


class Supervisor:
    """One rank's: looks after it ten times a second and does what the hub says."""

    def __init__(self, config: RunConfig, setting: Setting, rank: Rank, office: Office):
        self._config, self._setting, self._rank, self._office = config, setting, rank, office
        self._host = socket.gethostname()
        self._reported = 0.0
        self._was_overdue = False
        self._halted_at: float | None = None
        """Since when the rank's process has been stopped, as far as was seen."""
        self._pauses = Pauses()
        self._forgiven: tuple[Section, int, float] = (Section.SETUP, 0, 0.0)
        self._requests = 0
        self._over = False

    def run(self) -> Ending:
        """Until the hub says how it ends; then the rank and everything below it is gone."""
        while True:
            self._listen_for_signals()
            self._look()
            order = self._office.poll(_POLL_SECONDS)
            if order == DUMP:
                self._give_account()
            elif order is not None:
                return self._end(Ending.from_json(order))
            elif self._setting.launcher not in (None, os.getppid()):
                return self._end(Ending("died", 0, f"the launcher (pid {self._setting.launcher}) is gone"))

    def _end(self, ending: Ending) -> Ending:
        self._rank.child.kill()
        self._office.close()
        if ending.kind == "code" and ending.text:
            print(f"megalemur: rank {self._setting.rank}: {ending.text}", file=sys.stderr)  # noqa: T201
        return ending

    def _listen_for_signals(self) -> None:
        requests = self._rank.heard.count()
        if requests == self._requests or self._over:
            return
        self._requests, name = requests, self._rank.heard.names[-1]
        if requests == 1:
            self._rank.pulse.ask_to_stop()
            self._say(
                f"{name}: the run finishes its step, saves and leaves; another signal, {SAME_SECONDS:.0f} s from now "
                "or later, ends it at once"
            )
            return
        self._rank.child.kill()
        text = f"{name}: asked to stop a second time; ended at once, the last checkpoint is as it was"
        self._tell("twice", text=text)

    def _say(self, text: str) -> None:
        print(f"megalemur: rank {self._setting.rank}: {text}", file=sys.stderr, flush=True)  # noqa: T201

    def _look(self) -> None:
        """Report the rank's end, its being overdue at once, and where it is now and then."""
        if self._over:
            return
        code = self._rank.child.poll()
        if code is not None:
            self._over = True
            self._tell("ended", code=code)
            return
        self._forgive(self._pauses.found())
        self._note_halt()
        now, overdue = time.monotonic(), self._is_overdue()
        if overdue != self._was_overdue or now - self._reported >= _STATUS_SECONDS:
            self._reported, self._was_overdue = now, overdue
            self._tell("status")

    def _note_halt(self) -> None:
        """A process that somebody stopped makes no progress, whatever the section: no save is that slow."""
        if not is_stopped(state_of(self._rank.child.pid)):
            self._halted_at = None
        elif self._halted_at is None:
            self._halted_at = time.monotonic()

    def _forgive(self, seconds: float) -> None:
        """Time that nobody had does not count against the section and step that it fell into."""
        if self._halted_at is not None:
            self._halted_at += seconds
        section, steps, _ = self._rank.pulse.read()
        before = self._forgiven[2] if self._forgiven[:2] == (section, steps) else 0.0
        self._forgiven = section, steps, before + seconds

    def _is_overdue(self) -> bool:
        watchdog, beat = self._config.watchdog, self._rank.pulse.read()
        limit = watchdog.slow_timeout if beat.section.is_slow else self._config.watchdog_timeout
        forgiven = self._forgiven[2] if self._forgiven[:2] == beat[:2] else 0.0
        halted = time.monotonic() - self._halted_at if self._halted_at is not None else 0.0
        return watchdog.enabled and (beat.age - forgiven > limit or halted > self._config.watchdog_timeout)

    def _tell(self, kind: str, **more: object) -> None:
        beat = self._rank.pulse.read()
        message = {
            "is": kind,
            "host": self._host,
            "pid": self._rank.child.pid,
            "section": int(beat.section),
            "steps": beat.steps,
            "age": beat.age,
            "overdue": self._is_overdue(),
            **more,
        }
        self._office.send(message)

    def _give_account(self) -> None:
        """Say where the rank stands, and keep its stacks in a file."""
        if self._over:
            return
        pid = self._rank.child.pid
        state = state_of(pid)
        text = "" if is_stopped(state) else self._rank.stacks.ask(pid)
        frames = frames_of(text, self._rank.pulse.main_thread)
        self._tell(
            "account",
            state=state,
            stopped=is_stopped(state),
            waiting=waits_for_others(frames),
            place=str(place_in(frames) or ""),
            top=str(frames[0]) if frames else "",
        )
        where = self._config.log.directory / "stacks" / f"rank-{self._setting.rank:05d}.txt"
        keep(text or f"it wrote no stacks; its process is {state or 'in an unknown state'}\n", Path(where))
