"""What the loop tells those who watch it, and the three moments at which it does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol


class Event(NamedTuple):
    """Something that happened to the run and is no measurement: a skipped step, a rollback, replicas that differ."""

    kind: str
    """skip, spike, rollback or replicas."""
    text: str
    """For people."""
    facts: Mapping[str, bool | int | float | str] = {}
    """For programs, flat."""


@dataclass(frozen=True)
class StepReport:
    """One step, as every rank knows it."""

    step: int
    """Steps taken, this one included."""
    loss: float
    """Mean cross entropy a token over all replicas (nats)."""
    grad_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    """Rate of this step."""
    tokens: int
    """Tokens that went through the model in this step, over all replicas."""
    samples: int
    """Samples drawn since the beginning of the run."""
    skipped: bool
    """The update was not applied."""
    seconds: float
    """The whole step, waiting for data and for other ranks included; about equal on all ranks."""
    data_seconds: float
    """Time this rank waited for its batches."""
    rank_seconds: Sequence[float] = ()
    """Seconds that each rank took until its gradients were ready, before it waited for other replicas; empty where the
    loop did not ask."""
    peak_bytes: Sequence[int] = ()
    """Peak of the CUDA allocator on each rank since the start; empty on CPU and where the loop did not ask."""
    ledger: Mapping[str, int] = field(default_factory=dict)
    """Samples drawn from each source since the beginning; empty on steps that are not logged."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """Validation loss by source, on steps that validate."""
    save_write_seconds: float = 0.0
    """Seconds, from beginning to end, of the saves that ended since the step before: most of it in the background."""
    failed_saves: int = 0
    """Saves that failed since the step before."""
    events: Sequence[Event] = ()
    """What happened in this step or just before it."""


class Observer(Protocol):
    """Watches a run; never changes it. Called on every rank."""

    def after_step(self, report: StepReport) -> None:
        """A step is done."""

    def at_save(self, step: int, path: Path, seconds: float) -> None:
        """A save was begun, and training stood still for `seconds`; `path` may be written in the background yet."""

    def at_end(self) -> None:
        """The run ends, with or without an error."""
