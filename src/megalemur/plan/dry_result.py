"""What a dry run found, beside what the plan says; and how it is started, in processes that know torch.

This module does not: a plan without a dry run needs no torch, and one with it keeps torch out of its own process.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import orjson

from megalemur.config.parallel import ParallelConfig
from megalemur.config.run import RunConfig
from megalemur.plan.job import Job
from megalemur.plan.memory import StageMemory, memory_of


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be run."""

    config: RunConfig
    fused_norm: bool = True
    """Norms as CUDA runs them; False: as this machine's CPU does, with fp32 copies."""
    whole: bool = False
    """Run every operation of the step, not only those up to the peak."""


@dataclass(frozen=True, slots=True)
class Collective:
    """Collectives of one kind in one group."""

    kind: str
    """As torch names it."""
    group: str
    """Setting that makes the group: tensor, pipeline, data …"""
    calls: int
    bytes: int
    """Of the tensors that they write on this rank."""


@dataclass(frozen=True, slots=True)
class RankTrace:
    """What one rank's modules did. Bytes, unless said otherwise."""

    rank: int
    stage: int
    parameter_count: int
    """Parameters, vocabulary padding included."""
    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    """What stays behind the first micro-batch."""
    kept: tuple[int, ...]
    """Activations of a micro-batch in each chunk, between its forward and its backward pass."""
    peak: int
    """Everything, at its highest while the schedule ran."""
    flops: int
    """Of one micro-batch through all chunks of this rank, forward and backward, attention counted in full."""
    collectives: tuple[Collective, ...]
    """Of one micro-batch through all chunks, the reduction of the gradients and the gathering of parameters."""
    messages: tuple[Collective, ...]
    """Of the pipeline, in the part of the schedule that ran."""
    forwards: int
    """Forward operations that ran."""
    seconds: float
    """That building and running took."""

    @property
    def activations_peak(self) -> int:
        """What came and went with the micro-batches, at its highest."""
        return self.peak - self.parameters - self.gradients - self.optimizer - self.buffers


@dataclass(frozen=True, slots=True)
class Compared:
    """One rank's trace and the plan of its stage."""

    trace: RankTrace
    planned: StageMemory
    planned_flops: int

    @property
    def memory_error(self) -> float:
        """Planned over traced activations at the peak, less one."""
        return self.planned.activations_peak / self.trace.activations_peak - 1

    @property
    def total_error(self) -> float:
        """The same of everything that tensors take."""
        return self.planned.traced / self.trace.peak - 1

    @property
    def flops_error(self) -> float:
        """The same of the FLOPs."""
        return self.planned_flops / self.trace.flops - 1


@dataclass(frozen=True, slots=True)
class DryRun:
    """A dry run of one rank of each class that was asked for."""

    world_size: int
    ranks: tuple[Compared, ...]

    def as_json(self) -> dict[str, Any]:
        """For machines: traces, plans and their relative differences."""
        return {
            "world_size": self.world_size,
            "ranks": [
                {
                    "trace": asdict(one.trace),
                    "planned": asdict(one.planned),
                    "planned_flops": one.planned_flops,
                    "memory_error": one.memory_error,
                    "total_error": one.total_error,
                    "flops_error": one.flops_error,
                }
                for one in self.ranks
            ],
        }


def stage_of(parallel: ParallelConfig, rank: int) -> int:
    """Pipeline stage of a global rank; megatron-core counts stages slowest."""
    return rank // (parallel.world_size // parallel.pipeline)


def class_rank(parallel: ParallelConfig, stage: int) -> int:
    """The rank that stands for its stage: the last tensor-parallel one, which has the vocabulary's padding."""
    return stage * (parallel.world_size // parallel.pipeline) + parallel.tensor - 1


def parsed_ranks(parallel: ParallelConfig, text: str) -> list[int]:
    """Global ranks from `0,7,last`.

    Raises:
        ValueError: something else is written there, or the world has no such rank.
    """
    world = parallel.world_size
    ranks = []
    for word in (word.strip() for word in text.split(",")):
        if word != "last" and not word.isdecimal():
            raise ValueError(f"--ranks: {word!r} is no rank; write numbers and `last`, as in 0,7,last")
        rank = world - 1 if word == "last" else int(word)
        if rank >= world:
            raise ValueError(f"--ranks: there is no rank {rank} among {world}; use 0 to {world - 1}")
        ranks.append(rank)
    return ranks


def chosen_ranks(parallel: ParallelConfig, text: str | None, *, all_classes: bool) -> list[int]:
    """Ranks that a dry run is asked for: one of each stage, or those of `text`; without either the first and the last.

    Raises:
        ValueError: as `parsed_ranks`.
    """
    if all_classes:
        return [class_rank(parallel, stage) for stage in range(parallel.pipeline)]
    return parsed_ranks(parallel, text or "0,last")


def planned_flops(job: Job, stage: int) -> int:
    """FLOPs of a micro-batch through all chunks of a rank: observe/throughput.py's closed form, of this rank's share.

    Vocabulary padding counts, and so does what recompute repeats: both are computed.
    """
    tokens, split = job.tokens_per_rank, job.tensor
    layers = sum(job.layers[stage])
    attention = 4 * tokens * job.sequence_length * job.num_attention_heads * job.head_dim // split
    feed_forward = 2 * tokens * (3 if job.gated else 2) * job.hidden_size * job.ffn_hidden_size // split
    rows = (job.num_attention_heads + 2 * job.num_query_groups) * job.head_dim
    projections = 2 * tokens * job.hidden_size * (rows + job.num_attention_heads * job.head_dim) // split
    layer = projections + attention + feed_forward
    again = 0
    if job.recompute == "full":
        per_chunk = (min(job.recompute_layers, count) for count in job.layers[stage])
        again = (layers if job.recompute_method == "uniform" else sum(per_chunk)) * layer
    elif job.recompute == "selective":
        parts = {"core_attn": attention, "mlp": feed_forward}
        again = layers * sum(parts[name] for name in job.recompute_modules)
    output = 2 * tokens * job.hidden_size * job.vocab_size // split if stage == job.pipeline - 1 else 0
    return 3 * (layers * layer + output) + again


def dry_run(order: Order, ranks: Sequence[int], *, processes: int | None = None) -> DryRun:
    """Trace ranks and hold each against the plan. Ranks of one class are traced once, by the class's own rank.

    Args:
        order: what to run.
        ranks: global ranks.
        processes: how many trace at the same time; None: one a core, and no more than there are classes.

    Raises:
        ValueError: the run file asks for modules that are not installed.
        RuntimeError: a tracing process failed; its last words are shown.
    """
    parallel = order.config.parallel
    stages = sorted({stage_of(parallel, rank) for rank in ranks})
    count = processes or min(len(stages), len(os.sched_getaffinity(0)))
    parts = [part for number in range(count) if (part := stages[number::count])]
    with ThreadPoolExecutor(len(parts)) as pool:
        answers = pool.map(lambda part: _traced(order, [class_rank(parallel, stage) for stage in part]), parts)
        traces = sorted((trace for answer in answers for trace in answer), key=lambda trace: trace.stage)
    return compared(order, traces)


def compared(order: Order, traces: Sequence[RankTrace]) -> DryRun:
    """Traces beside the plan of the same kernels; both without the update, which is not run."""
    job = Job.of(order.config)
    job = replace(job, kernels=replace(job.kernels, fused_norm=order.fused_norm), update_bytes=0)
    plan = memory_of(job)
    rows = tuple(Compared(trace, plan[trace.stage], planned_flops(job, trace.stage)) for trace in traces)
    return DryRun(job.world_size, rows)


def _traced(order: Order, ranks: list[int]) -> list[RankTrace]:
    """Ask a process that has torch, on the CPU whatever else there is."""
    question = {
        "config": order.config.model_dump(mode="json"),
        "fused_norm": order.fused_norm,
        "whole": order.whole,
        "ranks": ranks,
    }
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megalemur.plan.dry_run"],
        input=orjson.dumps(question),
        capture_output=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if process.returncode:
        last = "\n".join(process.stderr.decode(errors="replace").splitlines()[-12:])
        raise RuntimeError(f"the dry run of ranks {ranks} failed with exit code {process.returncode}:\n{last}")
    answer = orjson.loads(process.stdout.splitlines()[-1])
    if "problem" in answer:
        raise ValueError(answer["problem"])
    return [_trace_of(values) for values in answer["traces"]]


def _trace_of(values: dict[str, Any]) -> RankTrace:
    lists = {name: tuple(Collective(**one) for one in values[name]) for name in ("collectives", "messages")}
    return RankTrace(**{**values, **lists, "kept": tuple(values["kept"])})
