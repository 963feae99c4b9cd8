"""The pipeline schedules of megatron-core, replayed: which stage runs what, in which order, and when.

1F1B (Narayanan et al. 2021, section 2.2.1) and its interleaved form (section 2.2.2), in the order of megatron-core
0.16's `forward_backward_pipelining_without_interleaving` and `..._with_interleaving`. p stages, v chunks a stage,
m micro-batches; chunk c of stage s holds the (c * p + s)-th part of the model.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Op(NamedTuple):
    """One micro-batch through one chunk, forward or backward."""

    backward: bool
    chunk: int
    micro_batch: int


class Span(NamedTuple):
    """When an operation ran; seconds from the start of the step."""

    op: Op
    start: float
    end: float


Timeline = tuple[tuple[Span, ...], ...]
"""Spans of each stage, in the order in which they ran."""


def _table(chunks: int, group: int, micro_batches: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in forward order: each group of `group` micro-batches goes through all chunks."""
    return [
        (chunk, micro_batch)
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for micro_batch in range(first, min(first + group, micro_batches))
    ]


def warm_up(stage: int, *, pipeline: int, chunks: int, micro_batches: int) -> int:
    """Forward operations of a stage before its first backward one, the first of the steady state not counted."""
    depth = pipeline - stage - 1
    ahead = 2 * depth + (chunks - 1) * pipeline if chunks > 1 else depth
    return min(ahead, micro_batches * chunks)


def order(stage: int, *, pipeline: int, chunks: int, micro_batches: int) -> list[Op]:
    """Operations of a stage in the order in which it runs them."""
    table = _table(chunks, pipeline if chunks > 1 else micro_batches, micro_batches)
    forwards = [Op(False, chunk, micro_batch) for chunk, micro_batch in table]
    backwards = [Op(True, chunks - 1 - chunk, micro_batch) for chunk, micro_batch in table]
    ahead = warm_up(stage, pipeline=pipeline, chunks=chunks, micro_batches=micro_batches)
    ops = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        ops += (forward, backward)
    return ops + backwards[len(forwards) - ahead :]


def awaited(op: Op, stage: int, *, pipeline: int, chunks: int) -> tuple[int, Op] | None:
    """(stage, operation) whose result an operation needs; None: it starts from the batch.

    The backward pass of the last part needs its own forward pass.
    """
    part = op.chunk * pipeline + stage
    if op.backward and part == pipeline * chunks - 1:
        return stage, op._replace(backward=False)
    if not op.backward and part == 0:
        return None
    before = part + (1 if op.backward else -1)
    return before % pipeline, op._replace(chunk=before // pipeline)


def replay(
    pipeline: int,
    chunks: int,
    micro_batches: int,
    seconds: Callable[[int, Op], float],
    *,
    message_seconds: float = 0.0,
) -> Timeline:
    """Run the schedule: each stage takes its operations in order, each as soon as what it needs has arrived.

    Args:
        pipeline: p.
        chunks: v.
        micro_batches: m; a multiple of p where v is above 1.
        seconds: time of an operation on a stage.
        message_seconds: from the end of an operation to the arrival of its result at another stage.
    """
    orders = [order(s, pipeline=pipeline, chunks=chunks, micro_batches=micro_batches) for s in range(pipeline)]
    done: list[dict[Op, float]] = [{} for _ in orders]
    spans: list[list[Span]] = [[] for _ in orders]
    moved = True
    while moved:
        moved = False
        for stage, ops in enumerate(orders):
            while len(spans[stage]) < len(ops):
                op = ops[len(spans[stage])]
                needed = awaited(op, stage, pipeline=pipeline, chunks=chunks)
                if needed is not None and needed[1] not in done[needed[0]]:
                    break
                arrival = 0.0
                if needed is not None:
                    arrival = done[needed[0]][needed[1]] + (message_seconds if needed[0] != stage else 0.0)
                start = max(arrival, spans[stage][-1].end if spans[stage] else 0.0)
                end = start + seconds(stage, op)
                spans[stage].append(Span(op, start, end))
                done[stage][op] = end
                moved = True
    return tuple(map(tuple, spans))


def step_seconds(timeline: Timeline) -> float:
    """From the first operation to the end of the last one."""
    return max(stage[-1].end for stage in timeline)


def peak_in_flight(ops: Sequence[Op]) -> int:
    """Most micro-batches (times chunks) whose activations a stage holds at once, in its order of operations."""
    held = peak = 0
    for op in ops:
        held += -1 if op.backward else 1
        peak = max(peak, held)
    return peak
