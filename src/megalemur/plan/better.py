"""What would be better: the search over layouts for one run file, on one cluster; and the winner as a run file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalemur.config.load import ConfigError, dump_run, load_run
from megalemur.config.run import RunConfig
from megalemur.plan.cluster import Cluster
from megalemur.plan.constants import fitted
from megalemur.plan.job import Job
from megalemur.plan.memory import peak_memory
from megalemur.plan.search import Candidate, Found, layouts, overrides, pareto, search
from megalemur.plan.step_time import TimeModel

HEADROOM = 0.05
"""Part of a card's memory that a layout must leave free to be proposed: what the plan of memory may be off by."""


@dataclass(frozen=True, slots=True)
class Better:
    """The layouts of a run on so many GPUs of a cluster."""

    cluster: Cluster
    gpus: int
    found: Found

    @property
    def best(self) -> Candidate | None:
        """The fastest; None: nothing fits."""
        return self.found.candidates[0] if self.found.candidates else None

    @property
    def front(self) -> tuple[Candidate, ...]:
        """No other layout is both faster and smaller than one of these."""
        return pareto(self.found.candidates)

    def distinct(self, count: int) -> list[Candidate]:
        """The fastest layouts of different TP x PP x CP x micro-batch x recompute; depth cut otherwise is a detail."""
        seen: dict[tuple[object, ...], Candidate] = {}
        for candidate in self.found.candidates:
            job = candidate.job
            seen.setdefault((job.tensor, job.pipeline, job.context, job.micro_batch_size, job.recompute), candidate)
            if len(seen) == count:
                break
        return list(seen.values())

    def by_tensor_and_pipeline(self) -> dict[tuple[int, int], Candidate]:
        """The fastest layout of each (TP, PP)."""
        fastest: dict[tuple[int, int], Candidate] = {}
        for candidate in self.found.candidates:
            fastest.setdefault((candidate.job.tensor, candidate.job.pipeline), candidate)
        return fastest


def look_for_better(config: RunConfig, cluster: Cluster, gpus: int | None = None) -> Better:
    """Search all layouts of a run.

    Args:
        config: the run; of its layout only what is not searched stays.
        cluster: what it runs on.
        gpus: processes in all; None: as many as the run file has.

    Raises:
        ValueError: no number of GPUs, or the cluster cannot run it.
    """
    count = config.parallel.world_size if gpus is None else gpus
    if count < 1:
        raise ValueError(f"--gpus {count}: a run takes 1 GPU or more")
    job, model = Job.of(config), TimeModel(cluster, fitted())
    every = layouts(
        job,
        gpus=count,
        gpus_per_node=cluster.gpus_per_node,
        vocab_size=config.model.vocab_size,
        pad_vocab_to=config.parallel.pad_vocab_to,
    )
    found = search(
        every,
        limit_bytes=int(cluster.memory_bytes * (1 - HEADROOM)),
        peak_bytes=peak_memory,
        seconds=lambda candidate: model.predict(candidate).seconds,
    )
    return Better(cluster, count, found)


def write_winner(better: Better, run_file: Path, given: Sequence[str], target: Path) -> RunConfig:
    """Write the fastest layout's resolved run file, ready to be launched.

    Args:
        better: what was found.
        run_file: the run file that was searched.
        given: overrides that it was searched with.
        target: file to write.

    Raises:
        ConfigError: nothing fits, the file exists, or it cannot be written there.
    """
    best = better.best
    if best is None:
        raise ConfigError(str(target), [f"not written: no layout fits {better.gpus} x {better.cluster.gpu}"])
    config = load_run(run_file, [*given, *overrides(best.job)])
    said = (
        f"# {run_file.name} on {better.gpus} GPUs of {better.cluster.name}: the fastest of {better.found.tried:,} "
        f"layouts that megalemur plan --search looked at,\n# {best.seconds:.2f} s a step and "
        f"{best.peak_bytes / 1e9:.1f} GB on its fullest stage, both predicted. Every setting is written out.\n"
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "x", encoding="utf-8") as file:
            file.write(said + dump_run(config))
    except OSError as error:
        raise ConfigError(str(target), [f"cannot be written: {error.strerror or error}; name another file"]) from None
    return config
