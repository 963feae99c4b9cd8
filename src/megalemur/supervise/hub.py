"""What rank 0's supervisor knows of all ranks, and what it makes of it. No sockets, no clock of its own."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from megalemur.supervise.endings import CHOSEN, Ending
from megalemur.supervise.pulse import Section
from megalemur.supervise.verdict import Account, hang_text
from megalemur.supervise.wire import Message

GRACE_SECONDS = 3.0
"""How long the others may still end by themselves after a rank ended badly: an error is usually raised by all."""
ACCOUNT_SECONDS = 3.0
"""How long supervisors have to say where their ranks stand."""

DUMP: Message = {"do": "dump"}


class Terms(NamedTuple):
    """What the hub goes by."""

    world_size: int
    requeue: int
    """Exit code of a rank that was asked to stop and saved."""
    join_seconds: float
    """How long a supervisor may take to report for the first time."""
    silence_seconds: float
    """How long it may say nothing afterwards."""
    stacks: str
    """Folder of the stacks, for messages."""


@dataclass
class Member:
    """One rank, as its supervisor reports it."""

    rank: int
    host: str = "?"
    pid: int = 0
    section: Section = Section.SETUP
    steps: int = 0
    age: float = 0.0
    overdue: bool = False
    """Beyond the limit of its section."""
    heard: float | None = None
    """When its supervisor last said something; None: never."""
    code: int | None = None
    """Exit code of the rank, negative for a signal; None while it runs."""
    ended: float = 0.0
    """When."""
    gone: bool = False
    """Its supervisor vanished before the run had ended."""
    account: Account | None = None

    @property
    def runs(self) -> bool:
        """Its rank still works, as far as is known."""
        return self.code is None and not self.gone

    @property
    def name(self) -> str:
        """Rank and host, for messages."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


@dataclass
class Hub:
    """All ranks of a run. Tell it what happens with `said` and `lost`, ask it what to do with `decide`."""

    terms: Terms
    started: float
    """Time, on the clock of all other calls (seconds)."""
    members: list[Member] = field(default_factory=list)
    _verdict: Ending | None = None
    _asked: float | None = None

    def __post_init__(self) -> None:
        self.members = [Member(rank) for rank in range(self.terms.world_size)]

    def said(self, rank: int, message: Message, now: float) -> None:
        """A supervisor reports; what makes no sense is passed over."""
        if not 0 <= rank < len(self.members):
            return
        member = self.members[rank]
        member.heard = now
        try:
            self._note(member, message, now)
        except (KeyError, TypeError, ValueError):
            return

    def _note(self, member: Member, message: Message, now: float) -> None:
        kind = message["is"]
        if kind == "ended":
            member.code, member.ended = int(message["code"]), now
        if kind == "twice":
            self._verdict = self._verdict or Ending("twice", 0, f"{member.name}: {message['text']}")
        if kind in ("status", "account", "ended"):
            member.host, member.pid = str(message["host"])[:200], int(message["pid"])
            member.section, member.steps = Section(message["section"]), int(message["steps"])
            member.age, member.overdue = float(message["age"]), bool(message["overdue"])
        if kind == "account":
            member.account = Account(
                rank=member.rank,
                host=member.host,
                pid=member.pid,
                steps=member.steps,
                section=member.section,
                age=member.age,
                state=str(message["state"]),
                stopped=bool(message["stopped"]),
                waiting=bool(message["waiting"]),
                place=str(message["place"]),
                top=str(message["top"]),
            )

    def lost(self, rank: int, now: float) -> None:
        """A supervisor is gone, its rank with it."""
        if 0 <= rank < len(self.members):
            self.members[rank].gone, self.members[rank].ended = True, now

    def forgive(self, seconds: float) -> None:
        """The hub itself did not run for so long: silence in that time is nobody's."""
        for member in self.members:
            if seconds and member.heard is not None:
                member.heard += seconds

    def decide(self, now: float) -> Message | None:
        """The order for all supervisors that is due now: DUMP, or an Ending as JSON; None most of the time."""
        if self._verdict is not None and self._verdict.kind == "twice":
            return self._verdict.to_json()
        if self._asked is not None:
            silent = [m for m in self.members if m.runs and m.account is None and m.heard is not None]
            if silent and now - self._asked < ACCOUNT_SECONDS:
                return None
            return (self._verdict or self._hung(now)).to_json()
        if all(member.code is not None for member in self.members):
            return self._whole().to_json()
        self._verdict = self._death(now)
        if self._verdict is None and not self._stalls(now):
            return None
        self._asked = now
        return DUMP

    def _whole(self) -> Ending:
        """All ranks have ended by themselves."""
        first = min(self._bad(), key=_likelihood, default=None)
        if first is None:
            stopped = any(member.code == self.terms.requeue for member in self.members)
            return Ending("code", self.terms.requeue if stopped else 0, "")
        assert first.code is not None
        if _chosen(first) or (len(self.members) == 1 and first.code > 0):
            return Ending("code", first.code, "")
        return Ending("died", 0, self._obituary(first))

    def _bad(self) -> list[Member]:
        return [member for member in self.members if member.code not in (None, 0, self.terms.requeue)]

    def _death(self, now: float) -> Ending | None:
        """What ends the others because one of them is no more."""
        for member in self.members:
            if member.gone and member.code in (None, 0, self.terms.requeue):
                return Ending("died", 0, f"{self._obituary(member)}: its supervisor is gone, and the rank with it")
            if member.heard is None and now - self.started > self.terms.join_seconds:
                said = f"rank {member.rank} was not heard of within {self.terms.join_seconds:.0f} s of the start"
                return Ending("died", 0, f"{said}; is it running, and can it reach rank 0's host?")
        bad = self._bad()
        if not bad or now - min(member.ended for member in bad) < GRACE_SECONDS:
            return None
        first = min(bad, key=_likelihood)
        running = ", ".join(str(m.rank) for m in self.members if m.runs)
        text = f"{self._obituary(first)}; still running: rank {running}"
        if all(_chosen(member) for member in bad):
            assert first.code is not None
            return Ending("code", first.code, text)
        return Ending("died", 0, text)

    def _obituary(self, member: Member) -> str:
        how = "was lost" if member.code is None else f"ended with code {member.code}"
        if member.code is not None and member.code < 0:
            how = f"was killed by {_signal_name(-member.code)}"
        also = [m.rank for m in self._bad() if m is not member]
        said = f"{member.name} {how} at step {member.steps + 1}, section {member.section.label}"
        return said + (f"; after it ended: rank {', '.join(map(str, also))}" if also else "")

    def _stalls(self, now: float) -> bool:
        """Whether a rank is overdue and no other explains it.

        Ranks that are done with a slow section wait in their next step for one that is still in it: a rank in a slow
        section excuses those that have taken as many steps or more. Nothing excuses one that is overdue in a slow
        section itself: it had all the time that such a section may take, or its process is stopped.
        """
        running = [member for member in self.members if member.runs]
        if any(self._is_silent(member, now) for member in running):
            return True
        slow = [member.steps for member in running if member.section.is_slow and not member.overdue]
        return any(m.overdue and (m.section.is_slow or not any(steps <= m.steps for steps in slow)) for m in running)

    def _is_silent(self, member: Member, now: float) -> bool:
        return member.heard is not None and now - member.heard > self.terms.silence_seconds

    def _hung(self, now: float) -> Ending:
        return Ending("hung", 0, hang_text(list(self._accounts(now)), self.terms.stacks))

    def _accounts(self, now: float) -> Iterator[Account]:
        for m in self.members:
            if not m.runs:
                continue
            silent = now - (m.heard if m.heard is not None else now)
            yield m.account or Account(
                m.rank, m.host, m.pid, m.steps, m.section, age=max(m.age, silent), answered=False
            )


def _chosen(member: Member) -> bool:
    return member.code in CHOSEN


def _likelihood(member: Member) -> tuple[bool, bool, float]:
    """Smallest for the rank that most likely ended first: the others fail in collectives within milliseconds of it."""
    assert member.code is not None
    return _chosen(member), member.code >= 0, member.ended


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
