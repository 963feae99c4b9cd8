"""The way from a supervisor to the hub: at home on rank 0, over a connection elsewhere. Alone knows both."""

import os
import time
from dataclasses import dataclass
from typing import Protocol

from megalemur.config.run import RunConfig
from megalemur.supervise.endings import Ending
from megalemur.supervise.hub import Hub, Terms
from megalemur.supervise.wire import Caller, Listener, Message

_LINGER_SECONDS = 2.0
_BIND_SECONDS = 30.0
"""A port may still belong to the run that this one follows."""
_UNREACHED_SECONDS = 10.0
"""How long a supervisor that has something grave to say looks for rank 0's before it acts alone."""
_MIN_SILENCE_SECONDS = 10.0
_PAUSE_SECONDS = 5.0
"""A supervisor that sleeps longer than this was stopped itself, and its rank with it: a batch system suspends jobs."""


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


class Office(Protocol):
    """The way to the hub: one's own on rank 0, over a connection elsewhere."""

    def send(self, message: Message) -> None:
        """Tell the hub."""

    def poll(self, seconds: float) -> Message | None:
        """The hub's order, waited for at most `seconds`."""

    def close(self) -> None:
        """The end has come."""


def open_office(config: RunConfig, setting: Setting, requeue: int) -> Office:
    if setting.rank > 0:
        return Away(setting, config.run.collective_timeout)
    terms = Terms(
        world_size=setting.world_size,
        requeue=requeue,
        join_seconds=config.run.collective_timeout,
        silence_seconds=max(config.watchdog_timeout, _MIN_SILENCE_SECONDS),
        stacks=str(config.log.directory / "stacks"),
    )
    return AtHome(setting, terms)


class Pauses:
    """Finds the time in which this process did not run."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def found(self) -> float:
        """Seconds lost since the last call; 0 where it was called in time."""
        now = time.monotonic()
        gap, self._last = now - self._last, now
        return gap if gap > _PAUSE_SECONDS else 0.0


class AtHome:
    """Rank 0's office: holds the hub, listens to the others, sends the orders."""

    def __init__(self, setting: Setting, terms: Terms):
        self._setting = setting
        self._hub = Hub(terms, time.monotonic())
        self._listener: Listener | None = None
        self._give_up = time.monotonic() + _BIND_SECONDS
        self._lost: set[int] = set()
        self._pauses = Pauses()

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
        self._hub.forgive(self._pauses.found())
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

    def __init__(self, setting: Setting, join_seconds: float):
        self._give_up = time.monotonic() + join_seconds
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
        if not self._caller.connected and time.monotonic() > self._give_up:
            text = f"rank 0's supervisor could not be reached at {self._where}; is it there?"
            return Ending("died", 0, text).to_json()
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
