"""Everything that a plan says about a run: memory, time, cost and saves, from the run file and a cluster."""

import math
from dataclasses import dataclass

from megalemur.config.run import RunConfig
from megalemur.plan.checkpoint_cost import CheckpointCost, checkpoint_cost
from megalemur.plan.cluster import Cluster
from megalemur.plan.constants import fitted
from megalemur.plan.goodput import (
    Budget,
    Reliability,
    best_steps,
    between_failures,
    budget,
    goodput,
)
from megalemur.plan.job import Job
from megalemur.plan.lint.finding import Finding
from megalemur.plan.lint.run import lint_config
from megalemur.plan.memory import StageMemory, memory_of
from megalemur.plan.step_time import StepTime, predict

HOURS_A_YEAR = 24 * 365.25

HOST_COPY = 10e9
"""Bytes a second of a rank's copy of its state to host memory, for saves in the background. An assumption: PCIe of the
fourth generation takes 25 GB/s at most, and the ranks of a node share its memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What neither the run file nor the cluster says. All have defaults that the plan prints."""

    failures_per_gpu_year: float = 0.17
    """Failures that end the run, a GPU and year. The default is Llama 3's pre-training: goodput.LLAMA3_FAILURES."""
    disk_bytes_per_second: float = 5e9
    """What the file system takes from all ranks together."""
    restart_seconds: float = 600.0
    """From a failure until training goes on: noticing it, starting again, reading the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saves:
    """What failures and saves leave of the time."""

    reliability: Reliability
    every: int | None
    """Steps between saves in the run file; None: it saves at the end alone."""
    kept: float
    """Goodput with these, 0 to 1."""
    best_every: int | None
    """Steps between saves that keep most; None: nothing fails."""
    best_kept: float
    """Goodput with those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run before it is launched."""

    config: RunConfig
    cluster: Cluster
    assumptions: Assumptions
    job: Job
    memory: tuple[StageMemory, ...]
    """Of each pipeline stage."""
    step: StepTime
    checkpoint: CheckpointCost
    saves: Saves
    budget: Budget
    """Days and GPU hours to the last step, failures and saves included."""
    findings: tuple[Finding, ...]
    """What lint says of the run file, errors first."""

    @property
    def fits(self) -> bool:
        """Whether every stage fits its card."""
        return all(stage.total <= self.cluster.memory_bytes for stage in self.memory)

    @property
    def wrong(self) -> bool:
        """Whether lint found an error: training would refuse the file."""
        return any(finding.level == "error" for finding in self.findings)

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.config.run.steps * self.config.tokens_per_step

    @property
    def tokens_per_day(self) -> float:
        """Tokens a day while it trains; failures and saves not counted."""
        return 86400 * self.job.tokens_per_step / self.step.seconds


def make_plan(config: RunConfig, cluster: Cluster, assumptions: Assumptions | None = None) -> Plan:
    """Plan a run on a cluster.

    Args:
        config: the run file.
        cluster: what it runs on.
        assumptions: what neither of them says.

    Raises:
        ValueError: the cluster cannot run it (fp8 on GPUs that have none), or an assumption that is no quantity.
    """
    assumed, job = assumptions or Assumptions(), Job.of(config)
    memory = memory_of(job, cluster_memory=cluster.memory_bytes)
    step = predict(job, cluster, fitted(), exact=True)
    cost = checkpoint_cost(config, disk_bytes_per_second=assumed.disk_bytes_per_second)
    saves = _saves(config, step.seconds, cost, assumed)
    tokens, speed = config.run.steps * job.tokens_per_step, job.tokens_per_step / step.seconds
    return Plan(
        config=config,
        cluster=cluster,
        assumptions=assumed,
        job=job,
        memory=memory,
        step=step,
        checkpoint=cost,
        saves=saves,
        budget=budget(tokens, speed, job.world_size, max(saves.kept, 1e-9)),
        findings=tuple(lint_config(config, gpus_per_node=cluster.gpus_per_node)),
    )


def _saves(config: RunConfig, step_seconds: float, cost: CheckpointCost, assumed: Assumptions) -> Saves:
    behind = config.checkpoint.asynchronous
    reliability = Reliability(
        between_failures=between_failures(config.parallel.world_size, assumed.failures_per_gpu_year / HOURS_A_YEAR),
        save=cost.rank / HOST_COPY if behind else cost.whole_seconds,
        restart=assumed.restart_seconds,
        written_behind=cost.whole_seconds if behind else 0.0,
    )
    every, steps = config.checkpoint.save_every or None, max(1, config.run.steps)  # no step at all: as if one
    kept = goodput((every or steps) * step_seconds, reliability)
    best = best_steps(step_seconds, reliability)
    if best is not None and math.isfinite(reliability.between_failures):
        # a save in the background must be on the disk before the next one begins
        best = min(max(best, math.ceil(reliability.written_behind / step_seconds)), steps)
    best_kept = goodput((best or steps) * step_seconds, reliability)
    return Saves(reliability=reliability, every=every, kept=kept, best_every=best, best_kept=best_kept)
