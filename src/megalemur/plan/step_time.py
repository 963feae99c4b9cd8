"""Seconds of a training step: layers on stages, the schedule over them, gradients, optimizer.

The pipeline's time is either replayed operation by operation (exact) or taken from a closed form, which the search
uses; of the interleaved schedule over unequal stages there is none, and its first micro-batches are replayed.
Gradients travel beside the last backward pass and parameters beside the first forward pass: what outlasts them shows.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from megalemur.observe.throughput import utilisation
from megalemur.plan.cluster import Cluster
from megalemur.plan.collectives import Links
from megalemur.plan.constants import Constants
from megalemur.plan.flops import flops_per_token
from megalemur.plan.job import Job
from megalemur.plan.kernels import Device
from megalemur.plan.layer_time import LayerModel, Passes, Seconds, layer_key
from megalemur.plan.schedule import Op, Timeline, replay, step_seconds

_BUCKET = 40e6
"""Parameters in a gradient bucket, at least; megatron-core's choice is this or 1 M a replica."""
_ROUNDS = 4
"""Rounds of an interleaved schedule, p micro-batches each, that are replayed where its stages are unequal."""


class ChunkTime(NamedTuple):
    """Seconds of one micro-batch through one chunk, messages included where nothing hides them."""

    forward: float
    backward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """A predicted step."""

    seconds: float
    breakdown: dict[str, float]
    """Seconds by kind on the critical stage; they sum to `seconds`."""
    critical_stage: int
    """Stage with the most work."""
    chunks: tuple[tuple[ChunkTime, ...], ...]
    """Of each [stage][chunk]."""
    message_seconds: float
    """From the end of an operation to the arrival of its result on another stage."""
    tokens_per_second_per_gpu: float
    mfu_full_attention: float
    """Share of the peak, 0 to 1, every token attending to all others."""
    mfu_causal_attention: float
    """The same with the causal half."""

    def timeline(self, micro_batches: int) -> Timeline:
        """The step's operations, replayed."""
        return _replayed(self.chunks, micro_batches, self.message_seconds)


def predict(job: Job, cluster: Cluster, constants: Constants, *, exact: bool = False) -> StepTime:
    """The step of a job on a cluster.

    Args:
        job: model, batch and layout.
        cluster: what it runs on.
        constants: efficiencies; `constants.fitted()` are the measured ones.
        exact: replay the schedule instead of the closed form.

    Raises:
        ValueError: fp8 on a GPU that has none.
    """
    return TimeModel(cluster, constants).predict(job, exact=exact)


class TimeModel:
    """Predicts steps on one cluster; layers that jobs have in common are worked out once."""

    def __init__(self, cluster: Cluster, constants: Constants):
        self._cluster, self._constants = cluster, constants
        self._device, self._links = Device.of(cluster, constants), Links.of(cluster, constants)
        self._known: dict[tuple[object, ...], _Parts] = {}

    def _parts(self, job: Job) -> "_Parts":
        key = layer_key(job)
        if key not in self._known:
            model = LayerModel(job, self._cluster, self._constants)
            layer = model.layer()
            self._known[key] = _Parts(
                layer, sum(layer.forward), sum(layer.backward), model.repeated(layer), model.embedding(), model.output()
            )
        return self._known[key]

    def predict(self, job: Job, *, exact: bool = False) -> StepTime:
        """As the function of the same name."""
        if job.precision == "fp8" and not self._cluster.peak_teraflops_fp8:
            raise ValueError(f"cluster {self._cluster.name} has no fp8; use precision.fp8: null")
        parts, message = self._parts(job), self._message(job)
        hidden = job.overlap_p2p and job.chunks > 1
        # the interleaved schedule sends a forward and a backward message at the same time
        shown = 0.0 if hidden else message / (2 if job.chunks > 1 else 1)
        chunks = _chunk_times(job, parts, shown)
        work = [sum(map(sum, stage)) for stage in chunks]
        critical = work.index(max(work))
        arrival = message if hidden else 0.0
        span = _span(chunks, job.micro_batches, arrival, exact=exact, equal=len(set(job.layers)) == 1)
        exposed, optimizer = max(
            (self._data_parallel(job, stage, chunks[stage][0]) for stage in {0, critical, job.pipeline - 1}), key=sum
        )
        breakdown = {
            **_kinds(job, parts, critical),
            "pipeline_messages": 2 * job.chunks * job.micro_batches * shown,
            "bubble": max(0.0, span - job.micro_batches * work[critical]),  # below 0 by a rounding where there is none
            "data_parallel": exposed,
            "optimizer": optimizer,
            "other": self._constants.step_gap * math.log2(job.world_size),
        }
        seconds = sum(breakdown.values())
        tokens = job.tokens_per_step / seconds
        full, causal = self._utilisations(job, tokens)
        return StepTime(
            seconds=seconds,
            breakdown=breakdown,
            critical_stage=critical,
            chunks=chunks,
            message_seconds=arrival,
            tokens_per_second_per_gpu=tokens / job.world_size,
            mfu_full_attention=full,
            mfu_causal_attention=causal,
        )

    def _utilisations(self, job: Job, tokens_per_second: float) -> tuple[float, float]:
        """Model-FLOP utilisation in both conventions, against the peak of the precision that the products run in."""
        cluster = self._cluster
        peaks = {"fp8": cluster.peak_teraflops_fp8, "fp32": cluster.peak_teraflops_fp32}
        peak = peaks.get(job.precision) or cluster.peak_teraflops_16bit
        count = flops_per_token(job)
        return (
            utilisation(tokens_per_second, count.full_attention, devices=job.world_size, peak_teraflops=peak),
            utilisation(tokens_per_second, count.causal_attention, devices=job.world_size, peak_teraflops=peak),
        )

    def _message(self, job: Job) -> float:
        """Seconds of one message between neighbouring stages."""
        if job.pipeline == 1:
            return 0.0
        size = float(job.element_bytes * job.tokens_per_rank * job.hidden_size)
        if job.sequence_parallel or job.kernels.split_messages:
            size /= job.tensor
        return self._links.message(size, job.tensor * job.context * job.data)

    def _data_parallel(self, job: Job, stage: int, first: ChunkTime) -> tuple[float, float]:
        """Exposed seconds of gradient and parameter messages, and the optimizer's, on a stage with this first chunk."""
        replicas = job.data * job.context
        parameters = stage_parameters(job, stage)
        gradient = 4 if job.grads_in_fp32 else 2
        scatter = self._links.ring(gradient * parameters, replicas, job.tensor)
        # parameters, or an all-reduce's other half
        size = job.element_bytes if job.distributed_optimizer else gradient
        gather = self._links.ring(size * parameters, replicas, job.tensor)
        # the last chunk's last backward pass is p (v - 1) operations before the stage's last one
        steps = job.pipeline * (job.chunks - 1) + 1
        buckets = max(1.0, parameters / max(_BUCKET, 1e6 * replicas))
        if job.overlap_grad_reduce:
            window = steps * first.backward * (1 - 1 / buckets)
            reduced = max(scatter / buckets, scatter - window)
            if not job.distributed_optimizer:
                gather = max(gather / buckets, gather - max(0.0, window - scatter))
        else:
            reduced = scatter
        if job.distributed_optimizer and job.overlap_param_gather:
            gather = max(gather / buckets, gather - steps * first.forward * (1 - 1 / buckets))
        owned = parameters / (replicas if job.distributed_optimizer else 1)
        # Adam reads gradient, master and moments and writes all but the first; the norm reads the gradient before
        optimizer = self._device.moved(36.0 * owned + (gradient + 2.0) * parameters)
        return reduced + gather, optimizer


class _Parts(NamedTuple):
    """What jobs with equal layers share. Sums are of all kinds, seconds."""

    layer: Passes
    forward: float
    backward: float
    repeated: float
    embedding: Passes
    output: Passes


def stage_parameters(job: Job, stage: int) -> float:
    """Parameters that a rank of a stage holds."""
    held = sum(job.layers[stage]) * job.layer_parameters
    ends = (stage == 0) + (stage == job.pipeline - 1 and not (job.tie_embeddings and job.pipeline == 1))
    return (held + ends * job.vocab_size * job.hidden_size) / job.tensor


def _again(job: Job, parts: _Parts, count: int) -> float:
    """Seconds of recompute in the backward pass of a chunk of `count` layers."""
    if job.recompute == "full":
        return (count if job.recompute_method == "uniform" else min(count, job.recompute_layers)) * parts.forward
    return count * parts.repeated if job.recompute == "selective" else 0.0


def _chunk_times(job: Job, parts: _Parts, shown: float) -> tuple[tuple[ChunkTime, ...], ...]:
    """Seconds of one micro-batch through each [stage][chunk]."""
    known = {
        count: ChunkTime(count * parts.forward + shown, count * parts.backward + _again(job, parts, count) + shown)
        for count in set().union(*job.layers)
    }
    stages = [[known[count] for count in stage] for stage in job.layers]
    for stage, chunk, (forward, backward) in ((0, 0, parts.embedding), (-1, -1, parts.output)):
        time = stages[stage][chunk]
        stages[stage][chunk] = ChunkTime(time.forward + sum(forward), time.backward + sum(backward))
    return tuple(map(tuple, stages))


def _kinds(job: Job, parts: _Parts, stage: int) -> dict[str, float]:
    """Seconds a step of what a stage computes and of the messages within its layers, by kind."""
    count = sum(job.layers[stage])
    total = Seconds(recompute=sum(_again(job, parts, layers) for layers in job.layers[stage]))
    total = total.plus(parts.layer.forward, count).plus(parts.layer.backward, count)
    if stage == 0:
        total = total.plus(parts.embedding.forward).plus(parts.embedding.backward)
    if stage == job.pipeline - 1:
        total = total.plus(parts.output.forward).plus(parts.output.backward)
    return {kind: job.micro_batches * value for kind, value in total._asdict().items()}


def _replayed(chunks: tuple[tuple[ChunkTime, ...], ...], micro_batches: int, arrival: float) -> Timeline:
    def seconds(stage: int, op: Op) -> float:
        return chunks[stage][op.chunk].backward if op.backward else chunks[stage][op.chunk].forward

    return replay(len(chunks), len(chunks[0]), micro_batches, seconds, message_seconds=arrival)


def _span(
    chunks: tuple[tuple[ChunkTime, ...], ...], micro_batches: int, arrival: float, *, exact: bool, equal: bool
) -> float:
    """Seconds of the pipeline, from its first operation to its last.

    Args:
        chunks: seconds of each [stage][chunk].
        micro_batches: m.
        arrival: seconds from an operation's end to its result's arrival.
        exact: replay all of them.
        equal: whether all stages hold as many layers.
    """
    if exact:
        return step_seconds(_replayed(chunks, micro_batches, arrival))
    if equal or len(chunks[0]) == 1:
        return pipeline_seconds(chunks, micro_batches, arrival)
    # after a few rounds each takes as long as the one before; that is more than the slowest stage's work where its
    # chunks are unequal and wait for each other in turn
    few = min(micro_batches, _ROUNDS * len(chunks))
    seconds = step_seconds(_replayed(chunks, few, arrival))
    if few == micro_batches:
        return seconds
    one_less = step_seconds(_replayed(chunks, few - len(chunks), arrival))
    return seconds + (micro_batches - few) / len(chunks) * (seconds - one_less)


def pipeline_seconds(chunks: tuple[tuple[ChunkTime, ...], ...], micro_batches: int, arrival: float) -> float:
    """The schedule's time without replaying it.

    A stage is busy for all its micro-batches; before it the stages above it are filled, behind it they drain, and twice
    it waits for a round trip through the stages below it, less what it does meanwhile. With so few micro-batches that
    all go forward before the first comes back, it waits once. The slowest stage decides. With equal stages that is
    (m + (p - 1) / v) (f + b), as in Narayanan et al. 2021, section 2.2.

    Args:
        chunks: seconds of each [stage][chunk].
        micro_batches: m.
        arrival: seconds from an operation's end to its result's arrival.
    """
    depth, latest = len(chunks), 0.0
    above, below = 0.0, sum(stage[0].forward + stage[0].backward + 2 * arrival for stage in chunks)
    for number, stage in enumerate(chunks):
        forward, backward = stage[0]
        pair = forward + backward + 2 * arrival
        below -= pair
        ahead = depth - 1 - number
        if micro_batches > ahead:
            waited = max(0.0, below - ahead * forward) + max(0.0, below - ahead * backward)
        else:
            waited = max(0.0, below - (micro_batches - 1) * min(forward, backward))
        work = micro_batches * sum(c.forward + c.backward for c in stage)
        latest = max(latest, above + work + waited)
        above += pair
    return latest
