"""Memory of every pipeline stage, by replaying its order of operations; and its fullest moment.

A stage holds parameters, gradients and optimizer state all the time, and the activations of the micro-batches that are
between their forward and their backward pass. How many those are follows from the schedule (plan/schedule.py), how much
each keeps from plan/activations.py. Sizes are bytes on one rank; the ranks of a stage are alike (where the vocabulary
is padded, the last tensor-parallel rank is meant, which holds the padding).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megalemur.plan.activations import Chunk, chunk_of, message_bytes, standing_buffers
from megalemur.plan.job import Job
from megalemur.plan.schedule import Op, order

MASTER_BYTES, MOMENTS_BYTES = 4, 8
"""fp32 master and two fp32 moments of a parameter."""

CONTEXT_BYTES = 1 << 30
"""CUDA context, cuBLAS workspaces and NCCL's communicators. An assumption: not measured here."""
SLACK = 0.05
"""Part of the activations that the allocator holds beyond them, in blocks that do not fit. An assumption too."""


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
    """Of the allocator, and the CUDA context. Assumed."""
    in_flight: int
    """Micro-batches (times chunks) whose activations are held at the peak."""
    peak_op: Op
    """Operation of the peak."""
    peak_unit: str
    """Part of its chunk in which the peak is."""
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
    """An operation of a stage and the micro-batches held in each chunk while it runs (a forward one's own not yet)."""

    op: Op
    held: tuple[int, ...]


class Point(NamedTuple):
    """Memory of a stage around one operation, for charts. Bytes above parameters, gradients and optimizer."""

    op: Op
    before: int
    peak: int
    after: int


def moments(stage: int, *, pipeline: int, chunks: int, micro_batches: int) -> Iterator[Moment]:
    """Every operation of a stage in its order, with what is held."""
    held = [0] * chunks
    for op in order(stage, pipeline=pipeline, chunks=chunks, micro_batches=micro_batches):
        yield Moment(op, tuple(held))
        held[op.chunk] += -1 if op.backward else 1


def enough_micro_batches(pipeline: int, chunks: int, micro_batches: int) -> int:
    """Micro-batches of a step that has every moment of one with `micro_batches`: the steady state repeats itself."""
    return min(micro_batches, pipeline + 1 if chunks == 1 else 3 * pipeline)


@lru_cache(maxsize=8192)
def fullest_moments(stage: int, pipeline: int, chunks: int, micro_batches: int) -> tuple[Moment, ...]:
    """The moments of which one is the peak, whatever a chunk keeps: none holds less of every chunk than another.
    """
    enough = enough_micro_batches(pipeline, chunks, micro_batches)
    best: dict[tuple[bool, int], list[Moment]] = {}
    for moment in moments(stage, pipeline=pipeline, chunks=chunks, micro_batches=enough):
        rivals = best.setdefault((moment.op.backward, moment.op.chunk), [])
        if any(_covers(rival.held, moment.held) for rival in rivals):
            continue
        rivals[:] = [rival for rival in rivals if not _covers(moment.held, rival.held)] + [moment]
    return tuple(moment for rivals in best.values() for moment in rivals)


def _covers(held: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a >= b for a, b in zip(held, other, strict=True))


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


def _state(job: Job, parameters: int) -> tuple[int, int, int]:
    """Bytes of parameters, gradients, and masters with moments."""
    wide = job.precision == "fp32"
    shards = job.data * job.context if job.distributed_optimizer else 1
    owned = -(-parameters // shards)
    masters = 0 if wide else MASTER_BYTES  # fp32 parameters are their own masters
    return parameters * (4 if wide else 2), parameters * (4 if job.grads_in_fp32 else 2), owned * (masters + MOMENTS_BYTES)


def _buffers(job: Job, parameters: int) -> int:
    weights = 2 * parameters if job.precision == "fp8" else 0  # each matrix in 8 bits, as it is and transposed
    return standing_buffers(job) + weights


def _messages(job: Job, stage: int, op: Op) -> int:
    """Pipeline messages and gradients of the operations before that megatron-core's schedule still holds.

    Counted in traces; they are few, and no more than one micro-batch's input each.
    """
    if job.pipeline == 1:
        return 0
    first, last = stage == 0, stage == job.pipeline - 1
    if job.chunks == 1:
        count = (not first) if op.backward else 1 if first else 2 if last else 3
    elif last:
        count = 1 if op.chunk == job.chunks - 1 else 4
    else:
        count = 2
    return count * message_bytes(job)


def _level(job: Job, stage: int, chunks: tuple[Chunk, ...], moment: Moment) -> int:
    """Peak of activations while an operation runs."""
    own = chunks[moment.op.chunk]
    held = sum(count * chunk.kept for count, chunk in zip(moment.held, chunks, strict=True))
    return held + (own.backward if moment.op.backward else own.forward) + _messages(job, stage, moment.op)


def _peak_moment(job: Job, stage: int) -> tuple[int, Moment]:
    chunks = chunks_of(job, stage)
    found = fullest_moments(stage, job.pipeline, job.chunks, job.micro_batches)
    return max(((_level(job, stage, chunks, moment), moment) for moment in found), key=lambda pair: pair[0])


def memory_of(job: Job, *, cluster_memory: int | None = None) -> tuple[StageMemory, ...]:
    """Memory of each pipeline stage at its fullest moment.

    Args:
        job: the job.
        cluster_memory: bytes of one card, to say whether it fits.
    """
    return tuple(_stage_memory(job, stage, cluster_memory) for stage in range(job.pipeline))


def _stage_memory(job: Job, stage: int, capacity: int | None) -> StageMemory:
    count, chunks = stage_parameters(job, stage), chunks_of(job, stage)
    parameters, gradients, optimizer = _state(job, count)
    level, moment = _peak_moment(job, stage)
    held = sum(n * chunk.kept for n, chunk in zip(moment.held, chunks, strict=True))
    own = chunks[moment.op.chunk]
    unit = own.backward_unit if moment.op.backward else own.forward_unit
    logits = min(own.logits, level - held) if unit == "output layer" else 0
    return StageMemory(
        stage=stage,
        layers=job.layers[stage],
        parameter_count=count,
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=held,
        logits=logits,
        working=level - held - logits,
        buffers=_buffers(job, count),
        slack=int(SLACK * level) + CONTEXT_BYTES,
        in_flight=sum(moment.held) + (not moment.op.backward),
        peak_op=moment.op,
        peak_unit=unit,
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
    level = _peak_moment(job, stage)[0]
    return sum(_state(job, count)) + _buffers(job, count) + level + int(SLACK * level) + CONTEXT_BYTES


def memory_timeline(job: Job, stage: int) -> tuple[Point, ...]:
    """Activations of a stage around each of its operations, in their order."""
    chunks, points = chunks_of(job, stage), []
    for moment in moments(stage, pipeline=job.pipeline, chunks=job.chunks, micro_batches=job.micro_batches):
        before = sum(n * chunk.kept for n, chunk in zip(moment.held, chunks, strict=True))
        kept = chunks[moment.op.chunk].kept
        after = before - kept if moment.op.backward else before + kept
        points.append(Point(moment.op, before, _level(job, stage, chunks, moment), after))
    return tuple(points)
