"""Memory of every pipeline stage, by replaying its order of operations; and its fullest moment.

A stage holds parameters, gradients and optimizer state all the time, and the activations of the micro-batches that are
between their forward and their backward pass. How many those are follows from the schedule (plan/schedule.py), how much
each keeps from plan/activations.py. Sizes are bytes on one rank; the ranks of a stage are alike (where the vocabulary
is padded, the last tensor-parallel rank is meant, which holds the padding).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import mul
from typing import NamedTuple

from megalemur.plan.activations import Chunk, chunk_of, message_bytes, standing_buffers
from megalemur.plan.job import Job
from megalemur.plan.schedule import Op, order

MASTER_BYTES, MOMENTS_BYTES = 4, 8
"""fp32 master and two fp32 moments of a parameter."""

CONTEXT_BYTES = 512 << 20
"""CUDA context with lazily loaded kernels, and cuBLAS workspaces. An assumption: not measured here."""
COMMUNICATOR_BYTES = 688 << 20
"""Of NCCL's buffers a communicator, outside the allocator: measured on four A100 over NVLink in
https://github.com/NVIDIA/nccl/issues/964 (544 MiB where it has two processes). More communicators take more, more
nodes than two do not (https://github.com/NVIDIA/nccl/issues/986)."""
SLACK = 0.05
"""Part of the activations that the allocator holds beyond them, in blocks that do not fit. An assumption too."""

UPDATE = "update"
"""Where a peak is that is in no part of a chunk."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What a rank of one stage holds at its fullest moment. Bytes."""

    stage: int
    layers: tuple[int, ...]
    """In each chunk."""
    parameter_count: int
    """Parameters on this rank, vocabulary padding included."""
    parameters: int
    gradients: int
    optimizer: int
    """Masters and moments."""
    activations: int
    """Kept by the micro-batches between their forward and backward pass at the peak."""
    logits: int
    """Logits and softmax, where the peak is in the output layer."""
    working: int
    """What the operation of the peak needs while it runs."""
    buffers: int
    """Stay all the time: the gathered sequence, rotary angles, 8-bit copies of the weights."""
    slack: int
    """Of the allocator, the CUDA context, and NCCL. Assumed."""
    in_flight: int
    """Micro-batches (times chunks) whose activations are held at the peak."""
    peak_op: Op
    """Operation of the peak."""
    peak_unit: str
    """Part of its chunk in which the peak is; UPDATE: it is in the update behind that operation."""
    capacity: int | None = None
    """Memory of the card, where it is known."""

    @property
    def activations_peak(self) -> int:
        """Everything that comes and goes with the micro-batches, at its highest."""
        return self.activations + self.logits + self.working

    @property
    def traced(self) -> int:
        """What tensors take: all but the assumed slack."""
        return self.parameters + self.gradients + self.optimizer + self.activations_peak + self.buffers

    @property
    def total(self) -> int:
        """What the card must have."""
        return self.traced + self.slack

    @property
    def fits(self) -> bool | None:
        """Whether the card has it; None: its memory is not known."""
        return None if self.capacity is None else self.total <= self.capacity


class Moment(NamedTuple):
    """An operation of a stage, and the micro-batches held in each chunk, or kind of chunk, when it begins."""

    op: Op
    held: tuple[int, ...]
    messages: int
    """Messages, and gradients of operations before, that the schedule still holds; each as large as a micro-batch's
    input."""


class Point(NamedTuple):
    """Memory of a stage around one operation, for charts. Bytes above parameters, gradients and optimizer."""

    op: Op
    before: int
    peak: int
    after: int


def moments(stage: int, *, pipeline: int, chunks: int, micro_batches: int) -> Iterator[Moment]:
    """Every operation of a stage in its order, with what is held."""
    held, returned = [0] * chunks, False
    ops = order(stage, pipeline=pipeline, chunks=chunks, micro_batches=micro_batches)
    for number, op in enumerate(ops):
        beside = ops[number - 1] if op.backward else ops[min(number + 1, len(ops) - 1)]
        paired = beside if beside.backward != op.backward else None
        messages = 0
        if returned:
            messages = _messages(op, paired, stage, pipeline, chunks)
        elif paired is not None and chunks > 1 and stage < pipeline - 1:
            messages = 1
        yield Moment(op, tuple(held), messages)
        held[op.chunk] += -1 if op.backward else 1
        returned |= op.backward


def _messages(op: Op, paired: Op | None, stage: int, pipeline: int, chunks: int) -> int:
    """Messages that megatron-core's schedule holds beside an operation's own input and gradient.

    They are those of the operations before, so there are none until a backward operation has run. Read off traces of
    every operation of small pipelines.

    Args:
        op: the operation.
        paired: the one that the steady state runs with it, forward first; None while warming up or cooling down.
        stage: number of the stage.
        pipeline: p.
        chunks: v.
    """
    first, last = stage == 0, stage == pipeline - 1
    if pipeline == 1:
        return 0
    if chunks == 1:
        if op.backward:
            return 0 if first else 1
        return 1 if first else 2 if last else 3
    if all(one.chunk < chunks - 1 for one in (op, paired) if one is not None):
        return 4
    return 1 if last else 2


def enough_micro_batches(pipeline: int, chunks: int, micro_batches: int) -> int:
    """Micro-batches of a step that has every moment of one with `micro_batches`: the steady state repeats itself."""
    return min(micro_batches, pipeline + 2 if chunks == 1 else 3 * pipeline)


@lru_cache(maxsize=8192)
def fullest_moments(
    stage: int, pipeline: int, chunks: int, micro_batches: int, kinds: tuple[int, ...]
) -> tuple[Moment, ...]:
    """The moments of which one is the peak, whatever a micro-batch keeps: none holds less of each kind than another.

    Args:
        stage: number of the stage.
        pipeline: p.
        chunks: v.
        micro_batches: m.
        kinds: of each chunk; chunks of one kind are alike, and what is held of them is added up.
    """
    enough = enough_micro_batches(pipeline, chunks, micro_batches)
    best: dict[tuple[bool, int], list[Moment]] = {}
    for op, held, messages in moments(stage, pipeline=pipeline, chunks=chunks, micro_batches=enough):
        by_kind = [0] * (max(kinds) + 1)
        for count, kind in zip(held, kinds, strict=True):
            by_kind[kind] += count
        moment = Moment(op, tuple(by_kind), messages)
        rivals = best.setdefault((op.backward, kinds[op.chunk]), [])
        if not any(_covers(rival, moment) for rival in rivals):
            rivals[:] = [rival for rival in rivals if not _covers(moment, rival)] + [moment]
    return tuple(moment for rivals in best.values() for moment in rivals)


def _covers(one: Moment, other: Moment) -> bool:
    return one.messages >= other.messages and all(a >= b for a, b in zip(one.held, other.held, strict=True))


def chunks_of(job: Job, stage: int) -> tuple[Chunk, ...]:
    """What each chunk of a stage allocates a micro-batch."""
    last_stage, last_chunk = job.pipeline - 1, len(job.layers[stage]) - 1
    return tuple(
        chunk_of(job, count, stage == 0 and number == 0, stage == last_stage and number == last_chunk)
        for number, count in enumerate(job.layers[stage])
    )


def stage_parameters(job: Job, stage: int) -> int:
    """Parameters on a rank of a stage, vocabulary padding included."""
    first, last, h = stage == 0, stage == job.pipeline - 1, job.hidden_size
    table = job.vocab_size // job.tensor * h
    tables = first + (last and not (first and job.tie_embeddings))
    split = (job.layer_parameters - 2 * h) // job.tensor + 2 * h  # norms are whole on each rank
    return sum(job.layers[stage]) * split + tables * table + (h if last else 0)


def communicators(job: Job) -> int:
    """NCCL communicators that a rank's steps use: tensor, pipeline, context, replicas, and all for the norm."""
    return sum(
        size > 1 for size in (job.tensor, job.pipeline, job.context, job.data * job.context, job.world_size)
    )  # a tied embedding has one more, on two stages, with two processes


def outside_allocator(job: Job) -> int:
    """Bytes that torch's counters do not see: the context and NCCL."""
    return CONTEXT_BYTES + communicators(job) * COMMUNICATOR_BYTES


def _owned(job: Job, parameters: int) -> int:
    """Parameters of a rank that it updates itself."""
    return -(-parameters // (job.data * job.context)) if job.distributed_optimizer else parameters


def _state(job: Job, parameters: int) -> tuple[int, int, int]:
    """Bytes of parameters, gradients, and masters with moments."""
    wide = job.precision == "fp32"
    masters = 0 if wide else MASTER_BYTES  # fp32 parameters are their own masters
    return (
        parameters * (4 if wide else 2),
        parameters * (4 if job.grads_in_fp32 else 2),
        _owned(job, parameters) * (masters + MOMENTS_BYTES),
    )


def _buffers(job: Job, stage: int) -> int:
    """Bytes that stay: of activations, and in fp8 each matrix of the layers in 8 bits, as it is and transposed. Tables
    are multiplied in 16 bits."""
    matrices = sum(job.layers[stage]) * (job.layer_parameters - 2 * job.hidden_size) // job.tensor
    return standing_buffers(job) + (2 * matrices if job.precision == "fp8" else 0)


class _Peak(NamedTuple):
    level: int
    held: int
    op: Op
    chunk: Chunk
    in_flight: int

    @property
    def unit(self) -> str:
        """Part of the chunk in which it is."""
        return self.chunk.backward_unit if self.op.backward else self.chunk.forward_unit


def _level(job: Job, moment: Moment, own: Chunk, held: int) -> int:
    """Peak of activations while an operation runs, above `held` bytes of all micro-batches in flight."""
    inside = own.backward if moment.op.backward else own.forward
    return held + inside + moment.messages * message_bytes(job)


def _peak(job: Job, stage: int) -> _Peak:
    chunks = chunks_of(job, stage)
    alike: dict[Chunk, int] = {}
    kinds = tuple(alike.setdefault(chunk, len(alike)) for chunk in chunks)
    kept = [chunk.kept for chunk in alike]
    best: _Peak | None = None
    for moment in fullest_moments(stage, job.pipeline, job.chunks, job.micro_batches, kinds):
        op, held, own = moment.op, sum(map(mul, moment.held, kept)), chunks[moment.op.chunk]
        level = _level(job, moment, own, held)
        if best is None or level > best.level:
            best = _Peak(level, held, op, own, sum(moment.held) + (not op.backward))
    assert best is not None, "a step has operations"
    update = job.update_bytes * _owned(job, stage_parameters(job, stage))
    return best if best.level >= update else _updating(job, update)


def _updating(job: Job, size: int) -> _Peak:
    """The peak where it is in the update, which comes after the last operation."""
    nothing = Chunk(kept=0, forward=0, forward_unit=UPDATE, backward=size, backward_unit=UPDATE, logits=0)
    return _Peak(size, 0, Op(True, 0, job.micro_batches - 1), nothing, 0)


def memory_of(job: Job, *, cluster_memory: int | None = None) -> tuple[StageMemory, ...]:
    """Memory of each pipeline stage at its fullest moment.

    Args:
        job: the job.
        cluster_memory: bytes of one card, to say whether it fits.
    """
    return tuple(_stage_memory(job, stage, cluster_memory) for stage in range(job.pipeline))


def _stage_memory(job: Job, stage: int, capacity: int | None) -> StageMemory:
    count = stage_parameters(job, stage)
    parameters, gradients, optimizer = _state(job, count)
    peak = _peak(job, stage)
    logits = min(peak.chunk.logits, peak.level - peak.held) if peak.unit == "output layer" else 0
    return StageMemory(
        stage=stage,
        layers=job.layers[stage],
        parameter_count=count,
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=peak.held,
        logits=logits,
        working=peak.level - peak.held - logits,
        buffers=_buffers(job, stage),
        slack=int(SLACK * peak.level) + outside_allocator(job),
        in_flight=peak.in_flight,
        peak_op=peak.op,
        peak_unit=peak.unit,
        capacity=capacity,
    )


def peak_memory(job: Job) -> int:
    """Bytes that the fullest stage needs: `max(stage.total for stage in memory_of(job))`, fast enough for a search.

    Of stages with equal layers between the ends only the first can be the fullest: fewer micro-batches are in flight on
    each one after it.
    """
    inner: dict[tuple[int, ...], int] = {}
    for stage in range(1, job.pipeline - 1):
        inner.setdefault(job.layers[stage], stage)
    return max(_total(job, stage) for stage in {0, *inner.values(), job.pipeline - 1})


def _total(job: Job, stage: int) -> int:
    count = stage_parameters(job, stage)
    level = _peak(job, stage).level
    return sum(_state(job, count)) + _buffers(job, stage) + level + int(SLACK * level) + outside_allocator(job)


def memory_timeline(job: Job, stage: int) -> tuple[Point, ...]:
    """Activations of a stage around each of its operations, in their order."""
    chunks, points = chunks_of(job, stage), []
    for moment in moments(stage, pipeline=job.pipeline, chunks=job.chunks, micro_batches=job.micro_batches):
        op, own = moment.op, chunks[moment.op.chunk]
        before = sum(count * chunk.kept for count, chunk in zip(moment.held, chunks, strict=True))
        after = before - own.kept if op.backward else before + own.kept
        points.append(Point(op, before, _level(job, moment, own, before), after))
    return tuple(points)
