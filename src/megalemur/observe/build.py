"""Chooses the observers of a run from its config."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import rich
import torch

from megalemur.config.run import RunConfig
from megalemur.observe.against_plan import AgainstPlan
from megalemur.observe.expectation import Expectation
from megalemur.observe.garbage import AlignedGarbageCollection
from megalemur.observe.memory import MemorySnapshot, cuda_memory
from megalemur.observe.meter import Meter, Work
from megalemur.observe.metrics import Metrics
from megalemur.observe.observer import Observer
from megalemur.observe.profiler import StepProfiler
from megalemur.observe.progress import Progress
from megalemur.observe.sinks import Guarded, JsonLines, Sink, TensorBoard
from megalemur.observe.terminal import Terminal
from megalemur.observe.throughput import flops_per_token, known_peak_teraflops


class Standing(NamedTuple):
    """Where a run stands beside its steps."""

    checkpoint: Callable[[], int] = int
    """Step of the newest checkpoint that stands, 0 for none."""
    plan: Expectation | None = None
    """The plan's figures, to be put beside the measured ones; None: there is no plan."""


def build_observers(
    config: RunConfig,
    *,
    rank: int,
    label: str,
    first_step: int,
    epoch_samples: Mapping[str, int] | None = None,
    standing: Standing | None = None,
) -> list[Observer]:
    """The observers of this rank, in the order in which they are to be called. Rank 0 prints the banner here.

    Args:
        config: the run.
        rank: global.
        label: coordinates of this process, as `tp1 pp0 dp3`; part of file names.
        first_step: steps taken already; above 0 the run is a resumed one.
        epoch_samples: samples in one epoch of each source, to report epochs.
        standing: what the run says of itself as it goes, and what was planned.
    """
    log, standing = config.log, standing or Standing()
    file_name = f"rank-{rank:05d}-{label.replace(' ', '-')}"
    observers: list[Observer] = [AlignedGarbageCollection(config.run.collect_garbage_every)]
    if log.profiler is not None and rank in log.profiler.ranks:
        trace = log.directory / "profile" / f"step-{log.profiler.start_step:06d}-{file_name}.json"
        observers.append(StepProfiler(log.profiler, path=trace, first_step=first_step))
    if log.memory_snapshot and torch.cuda.is_available():
        observers.append(MemorySnapshot(log.directory / "memory" / f"{file_name}.pickle"))
    progress = os.environ.get("MEGALEMUR_PROGRESS")  # the batch script's: it is no part of the run
    if rank == 0 and progress:
        observers.append(Progress(Path(progress), standing.checkpoint))
    if rank == 0:
        against = AgainstPlan(standing.plan, stages=config.parallel.pipeline) if standing.plan is not None else None
        if against is not None:
            observers.append(against)  # before the metrics, which ask it at each record

        def device_facts() -> Mapping[str, float | int]:
            return {**cuda_memory(), **(against.facts() if against is not None else {})}

        meter = Meter(build_work(config, epoch_samples or {}), device_facts=device_facts)
        sinks = build_sinks(config, first_step=first_step)
        observers.append(Metrics(meter, sinks, every=log.every, last_step=config.last_step))
    return observers


def build_work(config: RunConfig, epoch_samples: Mapping[str, int]) -> Work:
    """What the meter has to know of the run."""
    return Work(
        devices=config.parallel.world_size,
        sequence_length=config.data.sequence_length,
        last_step=config.last_step,
        flops=flops_per_token(config.model, config.data.sequence_length),
        peak_teraflops=config.log.peak_teraflops or _peak_of_this_device(),
        epoch_samples=epoch_samples,
    )


def _peak_of_this_device() -> float | None:
    return known_peak_teraflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def build_sinks(config: RunConfig, *, first_step: int) -> list[Sink]:
    """Terminal, JSON lines, and TensorBoard where wanted; none of them can stop the run."""
    directory: Path = config.log.directory
    resumed_from = first_step or None
    sinks: list[Sink] = [
        Guarded("terminal", lambda: Terminal(rich.get_console(), config)),
        Guarded("metrics.jsonl", lambda: JsonLines(directory / "metrics.jsonl", resumed_from=resumed_from)),
    ]
    if config.log.tensorboard:
        events = directory / "tensorboard"
        sinks.append(Guarded("TensorBoard", lambda: TensorBoard(events, resumed_from=resumed_from)))
    return sinks
