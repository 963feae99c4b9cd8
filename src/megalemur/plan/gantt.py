"""The pipeline of a step as bars in time: operations, messages, idle time, and what follows the last backward pass."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from megalemur.plan.job import Job
from megalemur.plan.schedule import warm_up
from megalemur.plan.whole import Plan

Kind = Literal["forward", "backward", "message", "bubble", "gradients", "optimizer"]

MOST_BARS, MOST_OF_ALL = 3000, 12000
"""More than these a browser draws slowly, and nobody sees; more than the second not even where filling the pipeline
takes them."""


class Bar(NamedTuple):
    """What a stage does for a while."""

    kind: Kind
    stage: int
    start: float
    seconds: float
    says: str


class Chart(NamedTuple):
    """Bars of a step, or of its beginning and its end."""

    panels: tuple[tuple[Bar, ...], ...]
    """One: the whole step. Two: its beginning and its end."""
    ranges: tuple[tuple[float, float], ...]
    """Seconds that each panel shows."""
    left_out: float
    """Seconds between the panels."""


def enough_bars(job: Job) -> int:
    """Bars that show the pipeline fill, a bit of its steady state, and drain."""
    ahead = warm_up(0, pipeline=job.pipeline, chunks=job.chunks, micro_batches=job.micro_batches)
    a_side = job.pipeline * (2 * ahead + 4 * job.pipeline)  # a message behind each operation
    return max(MOST_BARS, min(MOST_OF_ALL, 2 * a_side))


def chart(plan: Plan, most: int | None = None) -> Chart:
    """The step, replayed. A long one is shown at its ends: warm-up and the first of the steady state, and cool-down.

    Args:
        plan: the plan.
        most: bars in all, about; None: `enough_bars`.
    """
    most = enough_bars(plan.job) if most is None else most
    bars = sorted(_bars(plan), key=lambda bar: bar.start)
    end = max(bar.start + bar.seconds for bar in bars)
    if len(bars) <= most:
        return Chart((tuple(bars),), ((0.0, end),), 0.0)
    # the same length of time on both sides, as long as so many bars allow
    width = min(bars[most // 2].start, end - bars[len(bars) - most // 2].start)
    first, last = (0.0, width), (end - width, end)
    panels = tuple(tuple(_clipped(bars, *edges)) for edges in (first, last))
    return Chart(panels, (first, last), end - 2 * width)


def _clipped(bars: list[Bar], start: float, end: float) -> Iterator[Bar]:
    for bar in bars:
        begin, finish = max(bar.start, start), min(bar.start + bar.seconds, end)
        if finish > begin:
            yield bar._replace(start=begin, seconds=finish - begin)


def _bars(plan: Plan) -> Iterator[Bar]:
    step, job = plan.step, plan.job
    timeline = step.timeline(job.micro_batches)
    end = max(stage[-1].end for stage in timeline)
    operations = 2 * job.chunks * job.micro_batches
    message = step.breakdown["pipeline_messages"] / operations
    gradients, optimizer = step.breakdown["data_parallel"], step.breakdown["optimizer"]
    for stage, spans in enumerate(timeline):
        free = 0.0
        for op, start, finish in spans:
            if start > free + 1e-9:
                yield Bar("bubble", stage, free, start - free, "idle")
            chunk = f", chunk {op.chunk}" if job.chunks > 1 else ""
            kind: Kind = "backward" if op.backward else "forward"
            yield Bar(kind, stage, start, finish - start - message, f"{kind} of micro-batch {op.micro_batch}{chunk}")
            if message > 0:
                yield Bar("message", stage, finish - message, message, "messages to and from neighbours")
            free = finish
        if end > free + 1e-9:
            yield Bar("bubble", stage, free, end - free, "idle")
        if gradients > 0:
            yield Bar("gradients", stage, end, gradients, "gradients and parameters that nothing hides")
        yield Bar("optimizer", stage, end + gradients, optimizer, "optimizer")
