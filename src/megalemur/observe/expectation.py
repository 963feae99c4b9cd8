"""What a plan says of a run, frozen before it starts: all that this room knows about planning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Expectation:
    """A plan's figures."""

    step_seconds: float
    """Seconds of a step, saves and validation left out."""
    peak_bytes: tuple[int, ...]
    """Peak of the CUDA allocator on each pipeline stage; empty: nothing is claimed."""
    cluster: str
    """Name of the cluster that the plan is for."""
