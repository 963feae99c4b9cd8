"""Whether an update may be applied: decided before anything is changed, from values that are equal on all ranks."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megalemur.config.guard import GuardConfig
from megalemur.config.strict_json import canonical_json
from megalemur.observe.observer import Event

_SIGMA = 1.4826
"""Standard deviation of a normal distribution in units of its median absolute deviation."""
_FLOOR = 1e-3
"""Smallest deviation taken for normal, as a fraction of the median: a loss that stands still has a MAD of nothing."""


class Verdict(Enum):
    """What becomes of a step."""

    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "roll back"
    """Not applied, and too many in a row."""
    STOP = "stop"
    """Not applied: what must be equal on several ranks is not."""


class NumericalStop(RuntimeError):
    """Steps are rejected again and again, and going back to a checkpoint does not help or is not possible."""


class ReplicaError(RuntimeError):
    """What must be equal on several ranks is not: a bit flipped, or a kernel or a link computes wrongly."""


_Values = tuple[Annotated[float, Field(allow_inf_nan=False)], ...]


class GuardState(BaseModel):
    """What the guard remembers between steps: a part of trainer/state.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    losses: _Values = ()
    """Those of the last accepted steps, oldest first."""
    grad_norms: _Values = ()
    """Those of the same steps."""

    @model_validator(mode="after")
    def _of_the_same_steps(self) -> "GuardState":
        if len(self.losses) != len(self.grad_norms):
            raise ValueError(f"{len(self.losses)} losses and {len(self.grad_norms)} gradient norms")
        return self

    @classmethod
    def from_json(cls, values: Any) -> "GuardState":
        """From trainer/state.json; None: a checkpoint without one.

        Raises:
            ValueError: it is no such state.
        """
        try:
            # as JSON text: a strict model takes no list for a tuple otherwise
            return cls() if values is None else cls.model_validate_json(canonical_json(values))
        except (ValidationError, TypeError) as error:
            raise ValueError(f"trainer/state.json: guard is not what a guard writes: {error}") from None


def spike_over(values: Sequence[float], value: float) -> float:
    """How far a value lies above the median of others, in robust standard deviations; negative below it.

    Median and MAD: up to half of the values may be anything and move neither without bound (Hampel 1974).
    """
    middle = statistics.median(values)
    deviation = _SIGMA * statistics.median(abs(other - middle) for other in values)
    return (value - middle) / max(deviation, _FLOOR * abs(middle), 1e-30)


class Guard:
    """Rejects a step whose loss or gradient norm is not finite (megatron-core's own step would write NaN) or a spike,
    and one before which replicas have come apart."""

    def __init__(
        self,
        limits: GuardConfig,
        *,
        rejected_in_a_row: int = 0,
        state: GuardState = GuardState(),  # noqa: B008  (frozen)
        compare_replicas: Callable[[], Sequence[Event]] = tuple,
    ):
        """Set up.

        Args:
            limits: thresholds and patience.
            rejected_in_a_row: those before a restart.
            state: what the guard of an earlier process remembered.
            compare_replicas: events of what differs; called once a step, on all ranks.
        """
        self._limits, self._rejected_in_a_row = limits, rejected_in_a_row
        self._losses = deque(state.losses, maxlen=limits.window)
        self._grad_norms = deque(state.grad_norms, maxlen=limits.window)
        self._compare_replicas = compare_replicas
        self._apart: Sequence[Event] = ()
        self.events: list[Event] = []
        """What happened since `take_events`."""

    @property
    def state(self) -> GuardState:
        """For trainer/state.json."""
        return GuardState(losses=tuple(self._losses), grad_norms=tuple(self._grad_norms))

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """What becomes of a step with these values, the same on all ranks. Now and then a collective."""
        differences = self._compare_replicas()
        self.events += differences
        if differences:
            self._apart = differences
            return Verdict.STOP
        rejection = self._rejection(loss, grad_norm)
        if rejection is None:
            self._rejected_in_a_row = 0
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)
            return Verdict.APPLY
        self._rejected_in_a_row += 1
        self.events.append(rejection)
        return Verdict.ROLL_BACK if self._rejected_in_a_row >= self._limits.rollback_after else Verdict.SKIP

    def give_up(self) -> NoReturn:
        """End the run after the verdict STOP.

        Raises:
            ReplicaError: names ranks and tensors, on all ranks alike.
        """
        raise ReplicaError("\n".join(event.text for event in self._apart))

    def take_events(self) -> tuple[Event, ...]:
        """What happened since the last call."""
        events, self.events = tuple(self.events), []
        return events

    def _rejection(self, loss: float, grad_norm: float) -> Event | None:
        """Why a step is rejected, or None."""
        facts = {"loss": loss, "grad_norm": grad_norm, "rejected_in_a_row": self._rejected_in_a_row + 1}
        said = f"loss {loss:.6g}, gradient norm {grad_norm:.6g}, {facts['rejected_in_a_row']} in a row"
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Event("skip", f"not finite, no parameter was changed: {said}", facts)
        limits = self._limits
        for name, value, values, limit in (
            ("loss", loss, self._losses, limits.loss_spike),
            ("gradient norm", grad_norm, self._grad_norms, limits.grad_norm_spike),
        ):
            if limit is None or len(values) < limits.min_values:
                continue
            height = spike_over(values, value)
            if height > limit:
                why = f"{name} {height:.3g} robust deviations above the median of {len(values)} steps"
                return Event("spike", f"{why} (limit {limit:g}), no parameter was changed: {said}", facts)
        return None
