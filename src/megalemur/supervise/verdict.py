"""Who holds up a run: told from where every rank stood when it was asked. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

from megalemur.supervise.pulse import Section


@dataclass(frozen=True)
class Account:
    """Where a rank stood when the run hung."""

    rank: int
    host: str
    pid: int
    steps: int
    """Steps that it had taken."""
    section: Section
    age: float
    """Seconds without a sign of life."""
    answered: bool = True
    """Its supervisor said anything at all."""
    state: str = ""
    """Of its process, in words; empty where it cannot be seen."""
    stopped: bool = False
    """Somebody stopped the process."""
    waiting: bool = False
    """It waits for other ranks: in a collective, or for a message of the pipeline."""
    place: str = ""
    """Innermost frame of our own code; empty when the process could not write its stacks."""
    top: str = ""
    """Innermost frame."""

    @property
    def where(self) -> str:
        """Rank, host, step and place, as a message names them."""
        at = f"rank {self.rank} ({self.host}, pid {self.pid}), at step {self.steps + 1}, section {self.section.label}"
        if not self.answered:
            return f"{at}: no word from its supervisor"
        stands = f" in {self.place}" if self.place else ""
        inner = f", innermost {self.top}" if self.top and self.top != self.place else ""
        unable = "" if self.top else ", cannot write its stacks"
        return f"{at}{stands}{inner}; {self.state or 'state unknown'}{unable}"


def culprits(accounts: Sequence[Account]) -> tuple[list[Account], str]:
    """The ranks that the others wait for, and how that is known.

    A rank behind in steps may itself wait for the one to blame, so steps count only when nothing else tells.
    """
    guilty = [a for a in accounts if not a.answered or a.stopped or not a.waiting]
    if guilty and len(guilty) < len(accounts):
        return guilty, "all others wait for messages"
    if guilty:
        stopped = [a for a in guilty if a.stopped or not a.answered]
        return (stopped or guilty), "no rank waits for another"
    first = max(a.steps for a in accounts)
    behind = [a for a in accounts if a.steps < first]
    if behind:
        return behind, f"all wait for messages, and these have not taken step {first}"
    return list(accounts), (
        "all wait for messages in the same step: a network that loses them, or ranks that do not take part in the "
        "same collectives"
    )


def hang_text(accounts: Sequence[Account], stacks: str) -> str:
    """The message for a hung run: the culprits first.

    Args:
        accounts: of all ranks.
        stacks: folder of the stacks.
    """
    guilty, reason = culprits(accounts)
    seconds = max(a.age for a in guilty)
    lines = [f"no progress for {seconds:.0f} s; held up by ({reason}):"]
    lines += [f"  {a.where}" for a in guilty[:_SHOWN]]
    if len(guilty) > _SHOWN:
        lines.append(f"  and {len(guilty) - _SHOWN} more: ranks {', '.join(str(a.rank) for a in guilty[_SHOWN:])}")
    others = [a for a in accounts if a not in guilty]
    if others:
        lines.append(f"the other {len(others)}, for example: {others[0].where}")
    return "\n".join([*lines, f"stacks of all ranks: {stacks}"])


_SHOWN = 16
