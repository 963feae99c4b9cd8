"""How a supervised run may end, besides by itself: as types that the command line turns into exit codes."""

from typing import Any, NamedTuple

CHOSEN = range(2, 120)
"""Exit codes that a program chooses. 1 is a traceback, 120 a failed shutdown of Python, more a signal."""


class RunHung(RuntimeError):
    """A rank made no progress for too long."""


class RankDied(RuntimeError):
    """A rank ended without a code of its own, or its supervisor is gone."""


class StoppedTwice(RuntimeError):
    """A second request to stop: ended at once, without another checkpoint."""


_KINDS = {"hung": RunHung, "died": RankDied, "twice": StoppedTwice}


class Ending(NamedTuple):
    """What all supervisors of a run end with."""

    kind: str
    """`code`, or why no code of a rank counts: `hung`, `died`, `twice`."""
    code: int
    """Exit code, where kind is `code`."""
    text: str
    """For people; empty where the ranks have said it all."""

    def finish(self) -> int:
        """The exit code of the run.

        Raises:
            RunHung, RankDied, StoppedTwice: for what is not a code.
        """
        if self.kind == "code":
            return self.code
        raise _KINDS[self.kind](self.text)

    def to_json(self) -> dict[str, Any]:
        """As it travels."""
        return {"do": "end", **self._asdict()}

    @classmethod
    def from_json(cls, order: dict[str, Any]) -> "Ending":
        """The inverse; something that makes no sense is a death."""
        kind, code = order.get("kind"), order.get("code")
        if not isinstance(code, int) or kind not in ("code", *_KINDS):
            return cls("died", 0, "rank 0's supervisor sent something that makes no sense")
        return cls(kind, code, str(order.get("text", "")))
