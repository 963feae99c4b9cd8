"""What failures cost: the share of the time that trains, the best time between saves, days and GPU hours to a budget.

Failures come at random (exponential) with mean time M between those of the whole job. A save stops training for d
seconds every t seconds of training, a restart takes R. What was trained since the last save is lost. A stretch of t
then takes M exp(R / M) (exp((t + d) / M) - 1) on average (the complete model of Daly 2006): failures during saves and
restarts count too. A save that is written behind training is safe only w seconds after it was taken: a failure loses w
more.
"""

import math
from dataclasses import dataclass

LLAMA3_FAILURES = 419 / (54 * 24 * 16384)
"""Failures a GPU hour of Llama 3's pre-training: 419 unexpected interruptions in 54 days on 16,384 H100 (Llama Team
2024, section 3.3.4), 78 % of them put down to hardware (table 5)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """How often a job fails, and what saving and starting again costs. Seconds."""

    between_failures: float
    """M, mean, of the whole job; infinity: it never fails."""
    save: float
    """d: training stands still for one save."""
    restart: float
    """R: from a failure until training goes on, queue and reading the checkpoint included."""
    written_behind: float = 0.0
    """w: from a save until it is safe, where it is written while training goes on."""

    def __post_init__(self) -> None:
        if not self.between_failures > 0:
            raise ValueError(f"the time between failures is {self.between_failures} s; it must be above 0")
        for name in ("save", "restart", "written_behind"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)} s; it must be 0 or more, and finite")


def between_failures(gpus: int, failures_per_gpu_hour: float = LLAMA3_FAILURES) -> float:
    """Mean seconds between failures of a job on so many GPUs.

    Raises:
        ValueError: no GPUs, or a negative rate.
    """
    if gpus < 1 or failures_per_gpu_hour < 0:
        raise ValueError(
            f"{gpus} GPUs with {failures_per_gpu_hour} failures an hour each; give 1 or more, and 0 or more"
        )
    return 3600 / (gpus * failures_per_gpu_hour) if failures_per_gpu_hour else math.inf


def between_failures_of_nodes(nodes: int, node_hours: float) -> float:
    """Mean seconds between failures of a job on nodes that each fail every `node_hours` hours.

    Raises:
        ValueError: no nodes, or no time.
    """
    if nodes < 1 or not node_hours > 0:
        raise ValueError(f"{nodes} nodes that fail every {node_hours} hours; give 1 or more, and more than 0")
    return 3600 * node_hours / nodes


def goodput(interval: float, reliability: Reliability) -> float:
    """Share of the time, 0 to 1, that goes into training that is kept.

    Args:
        interval: t, seconds of training between saves.
        reliability: failures and costs.

    Raises:
        ValueError: no time between saves.
    """
    if not 0 < interval < math.inf:
        raise ValueError(f"{interval} s between saves; it must be above 0, and finite")
    mean = reliability.between_failures
    if math.isinf(mean):
        return interval / (interval + reliability.save)
    exponent = (interval + reliability.save) / mean
    lost = (reliability.restart + reliability.written_behind) / mean
    if exponent + lost > 700:  # more than a float holds: nothing is ever kept
        return 0.0
    return interval / (mean * math.exp(lost) * math.expm1(exponent))


def best_interval(reliability: Reliability) -> float:
    """Seconds of training between saves that keep most: the root of 1 - t / M = exp(-(t + d) / M).

    Young's sqrt(2 d M) (1974) is its first term. Infinity: nothing fails. 0: saves cost nothing.
    """
    mean, save = reliability.between_failures, reliability.save
    if math.isinf(mean):
        return math.inf
    low, high = 0.0, mean  # the left side falls to 0 at M, where the right side is positive
    while high - low > 1e-9 * mean:
        middle = (low + high) / 2
        if 1 - middle / mean > math.exp(-(middle + save) / mean):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def best_steps(step_seconds: float, reliability: Reliability) -> int | None:
    """Steps between saves that keep most; None: nothing fails, so any number will do.

    Raises:
        ValueError: a step that takes no time.
    """
    if not step_seconds > 0:
        raise ValueError(f"a step of {step_seconds} s; it must be above 0")
    seconds = best_interval(reliability)
    if math.isinf(seconds):
        return None
    fewer = max(1, math.floor(seconds / step_seconds))
    return max((fewer, fewer + 1), key=lambda steps: goodput(steps * step_seconds, reliability))


@dataclass(frozen=True, slots=True)
class Budget:
    """What a number of tokens takes."""

    days: float
    gpu_hours: float


def budget(tokens: float, tokens_per_second: float, gpus: int, kept: float = 1.0) -> Budget:
    """Days and GPU hours to a number of tokens.

    Args:
        tokens: to train on.
        tokens_per_second: of the whole job while it trains.
        gpus: that it holds.
        kept: goodput, 0 to 1.

    Raises:
        ValueError: nothing is trained, or nothing is kept.
    """
    if not (tokens >= 0 and tokens_per_second > 0 and 0 < kept <= 1):
        raise ValueError(
            f"{tokens} tokens at {tokens_per_second} a second, {kept} of them kept: no number of days; "
            "save more often, or use fewer GPUs, if nothing is kept"
        )
    hours = tokens / (tokens_per_second * kept) / 3600
    return Budget(days=hours / 24, gpu_hours=hours * gpus)
