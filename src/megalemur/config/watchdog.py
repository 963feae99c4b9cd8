"""When a rank counts as stalled."""

from pydantic import PositiveFloat

from megalemur.config.section import Section


class WatchdogConfig(Section):
    """The process beside each rank. It always ends the run when a rank dies; what is set here is about stalls."""

    enabled: bool = True
    """End the run when a rank makes no progress. false: only the time limits of collectives end it."""
    timeout: PositiveFloat | None = None
    """Seconds that a step may take on any rank; then the run ends with the code of a hang. Must exceed the longest
    ordinary step. Unset: half of run.collective_timeout. Loading, first steps, saves and validation are exempt."""
    slow_timeout: PositiveFloat = 7200.0
    """Seconds that the exempt sections may take: what ends a save that hangs and in which no collective waits."""
