"""Forks a rank and stays beside it until the run ends: what `megalemur train` does before it trains."""

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megalemur.config.run import RunConfig
from megalemur.supervise.deadline import deadline
from megalemur.supervise.endings import Ending
from megalemur.supervise.hub import DUMP, Hub, Terms
from megalemur.supervise.process import Child, fork, is_stopped, state_of
from megalemur.supervise.pulse import Pulse
from megalemur.supervise.signals import SAME_SECONDS, Heard, StopRequest
from megalemur.supervise.stacks import Stacks, frames_of, keep, place_in, waits_for_others
from megalemur.supervise.wire import Caller, Listener, Message

_POLL_SECONDS = 0.1
_STATUS_SECONDS = 1.0
_LINGER_SECONDS = 2.0
_BIND_SECONDS = 30.0
"""A port may still belong to the run that this one follows."""
_UNREACHED_SECONDS = 10.0
"""How long a supervisor that has something grave to say looks for rank 0's before it acts alone."""
_MIN_SILENCE_SECONDS = 10.0

Work = Callable[[RunConfig, StopRequest, Pulse], int]


@dataclass(frozen=True)
class Setting:
    """Where this supervisor stands among the others."""

    rank: int
    world_size: int
    address: tuple[str, int]
    """Of rank 0's supervisor."""
    token: str
    """Known to the supervisors of one run alone."""
    launcher: int | None
    """Process that must outlive this one's rank; None: nobody asks."""

    @classmethod
    def from_environment(cls) -> "Setting":
        """As the launcher set it.

        MEGALEMUR_SUPERVISOR_PORT is a port of rank 0's host, and the one above MASTER_PORT where it is not set;
        MEGALEMUR_TOKEN any text that strangers do not know.

        Raises:
            ValueError: a number is no number.
        """
        port = _number("MEGALEMUR_SUPERVISOR_PORT", _number("MASTER_PORT", 0) + 1)
        launcher = _number("MEGALEMUR_LAUNCHER_PID", 0)
        return cls(
            rank=_number("RANK", 0),
            world_size=_number("WORLD_SIZE", 1),
            address=(os.environ.get("MASTER_ADDR", "127.0.0.1"), port),
            token=os.environ.get("MEGALEMUR_TOKEN", ""),
            launcher=launcher or None,
        )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdigit():
        raise ValueError(f"{name}={text} in the environment is no number; the launcher sets it")
    return int(text or default)


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
    pid = fork()
    if pid == 0:
        stacks.listen()
        with StopRequest(pulse, wakeup=heard.wakeup, deadline=deadline(config.run.stop_before)) as stop:
            return work(config, stop, pulse)
    heard.leave_to_rank()
    child = Child(pid)
    try:
        hub = _hub(config, setting, requeue)
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


class Office(Protocol):
    """The way to the hub: one's own on rank 0, over a connection elsewhere."""

    def send(self, message: Message) -> None:
        """Tell the hub."""

    def poll(self, seconds: float) -> Message | None:
        """The hub's order, waited for at most `seconds`."""

    def close(self) -> None:
        """The end has come."""


def _hub(config: RunConfig, setting: Setting, requeue: int) -> Office:
    if setting.rank > 0:
        return Away(setting)
    terms = Terms(
        world_size=setting.world_size,
        requeue=requeue,
        join_seconds=config.run.collective_timeout,
        silence_seconds=max(config.watchdog_timeout, _MIN_SILENCE_SECONDS),
        stacks=str(config.log.directory / "stacks"),
    )
    return AtHome(setting, terms)


class AtHome:
    """Rank 0's office: holds the hub, listens to the others, sends the orders."""

    def __init__(self, setting: Setting, terms: Terms):
        self._setting = setting
        self._hub = Hub(terms, time.monotonic())
        self._listener: Listener | None = None
        self._give_up = time.monotonic() + _BIND_SECONDS
        self._lost: set[int] = set()

    def send(self, message: Message) -> None:
        """Tell the hub."""
        self._hub.said(0, message, time.monotonic())

    def poll(self, seconds: float) -> Message | None:
        """Listen for at most `seconds`, then decide; an order goes to the others first."""
        if self._setting.world_size > 1 and self._listener is None:
            self._listen()
        if self._listener is None:
            time.sleep(seconds)
        else:
            self._hear(self._listener, seconds)
        order = self._hub.decide(time.monotonic())
        if order is not None and self._listener is not None:
            for line in self._listener.lines.values():
                line.send(order)
        return order

    def _listen(self) -> None:
        try:
            self._listener = Listener(self._setting.address, self._setting.token)
        except OSError as error:
            if time.monotonic() > self._give_up:
                host, port = self._setting.address
                raise ValueError(
                    f"rank 0's supervisor cannot listen on {host}, port {port}: {error.strerror}; set "
                    "MEGALEMUR_SUPERVISOR_PORT to a free port, the same for all ranks"
                ) from error

    def _hear(self, listener: Listener, seconds: float) -> None:
        for rank, message in listener.poll(seconds):
            self._hub.said(rank, message, time.monotonic())
        for rank, line in listener.lines.items():
            if line.lost and rank not in self._lost:
                self._lost.add(rank)
                self._hub.lost(rank, time.monotonic())

    def close(self) -> None:
        """Wait until the others have read the last order."""
        if self._listener is not None:
            self._listener.close(_LINGER_SECONDS)


class Away:
    """Another rank's office: a connection to rank 0's."""

    def __init__(self, setting: Setting):
        self._where = "{}:{}".format(*setting.address)
        self._caller = Caller(setting.address, {"rank": setting.rank, "token": setting.token})
        self._grave: tuple[float, Message] | None = None

    def send(self, message: Message) -> None:
        """Tell rank 0, once it is there."""
        if self._caller.connected or message["is"] != "status":
            self._caller.send(message)
        if message["is"] == "status" and not message["overdue"]:
            self._grave = None
        elif self._grave is None:
            self._grave = time.monotonic(), message

    def poll(self, seconds: float) -> Message | None:
        """Rank 0's order; its loss is one too."""
        orders = self._caller.poll(seconds)
        if orders:
            return orders[0]
        if self._caller.lost:
            text = f"rank 0's supervisor at {self._where} is gone, or closed the connection"
            return Ending("died", 0, text).to_json()
        if not self._caller.connected and self._grave is not None:
            return self._alone(*self._grave)
        return None

    def _alone(self, since: float, message: Message) -> Message | None:
        """What to do about something grave that nobody is there to hear."""
        if message["is"] == "twice":
            return Ending("twice", 0, str(message["text"])).to_json()
        if time.monotonic() - since < _UNREACHED_SECONDS:
            return None
        unheard = f"rank 0's supervisor at {self._where} could not be reached"
        if message["is"] != "ended":
            return Ending("hung", 0, f"no progress for {message['age']:.0f} s; {unheard}").to_json()
        if message["code"] < 2:
            return Ending("died", 0, f"this rank ended with code {message['code']}; {unheard}").to_json()
        return Ending("code", message["code"], "").to_json()

    def close(self) -> None:
        """Hang up."""
        self._caller.close()


class Supervisor:
    """One rank's: looks after it ten times a second and does what the hub says."""

    def __init__(self, config: RunConfig, setting: Setting, rank: Rank, office: Office):
        self._config, self._setting, self._rank, self._office = config, setting, rank, office
        self._host = socket.gethostname()
        self._reported = 0.0
        self._was_overdue = False
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
        now, overdue = time.monotonic(), self._is_overdue()
        if overdue != self._was_overdue or now - self._reported >= _STATUS_SECONDS:
            self._reported, self._was_overdue = now, overdue
            self._tell("status")

    def _is_overdue(self) -> bool:
        watchdog, beat = self._config.watchdog, self._rank.pulse.read()
        limit = watchdog.slow_timeout if beat.section.is_slow else self._config.watchdog_timeout
        return watchdog.enabled and beat.age > limit

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
