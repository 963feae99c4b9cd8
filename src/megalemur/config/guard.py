"""Which steps are not applied, and what a run does when they come in a row."""

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megalemur.config.section import Section


class GuardConfig(Section):
    """Numerical guard. A step whose loss or gradient norm is not finite is always skipped; spikes where asked for."""

    loss_spike: PositiveFloat | None = Field(default=None, ge=1)
    """Robust standard deviations (1.4826 x MAD) above the median of the window from which a loss is a spike and its
    step is skipped; 10 is a cautious value. Unset: a finite loss is never a spike."""
    grad_norm_spike: PositiveFloat | None = Field(default=None, ge=1)
    """The same for the global gradient norm before clipping, whose tail is longer; 20 is a cautious value."""
    window: PositiveInt = 128
    """Last accepted steps whose median and MAD are the measure. What was rejected never enters it."""
    min_values: PositiveInt = 32
    """Accepted steps before spikes are judged at all, also after a change that moves the loss (docs/guards.md)."""
    rollback_after: PositiveInt = 10
    """Rejected steps in a row after which the run goes back to its newest checkpoint that verifies and passes over the
    samples of those steps."""
    max_rollbacks: NonNegativeInt = 3
    """Rollbacks of a run; where one more is due, it stops. 0: it stops instead of rolling back."""
