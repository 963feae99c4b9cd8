"""The learning rate of a step: a pure function of the step, so that a resume has nothing to restore. No torch."""

import math

from megalemur.config.optim import OptimConfig, ScheduleConfig


def learning_rate(step: int, optim: OptimConfig, schedule: ScheduleConfig, total_steps: int) -> float:
    """Learning rate of one step.

    Counted in updates, t = step + 1: the warm-up ends with an update at the peak, and the last update of a decay runs
    at the floor. Cosine: Loshchilov and Hutter 2017, section 3, one cycle. Warm-up-stable-decay: Hu et al. 2024
    (MiniCPM), section 4, with a linear decay.

    Args:
        step: steps taken before this one, skipped ones included.
        optim: for the peak.
        schedule: the shape.
        total_steps: run.steps; not where a run pauses.
    """
    assert step >= 0
    update, peak = step + 1, optim.learning_rate
    if update <= schedule.warmup_steps:
        return peak * (update / schedule.warmup_steps)  # exactly the peak at the end
    floor = peak * schedule.min_ratio
    return floor + (peak - floor) * _remaining(update, schedule, total_steps)


def _remaining(update: int, schedule: ScheduleConfig, total_steps: int) -> float:
    """Share of the way from floor to peak that is left after the warm-up: 1 at the peak, 0 at the floor."""
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        start, end = schedule.warmup_steps, schedule.decay_steps or total_steps
        return 0.5 * (1 + math.cos(math.pi * _progress(update, start, end)))
    length = schedule.decay_steps or max(1, total_steps // 10)
    # a decay as long as the run must not begin inside the warm-up
    start = max(schedule.warmup_steps, total_steps - length)
    return 1 - _progress(update, start, total_steps)


def _progress(update: int, start: int, end: int) -> float:
    """0 up to `start`, 1 from `end` on."""
    return min(1.0, max(0, update - start) / max(1, end - start))
