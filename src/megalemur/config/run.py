"""The whole run: the file that launches is the file that plans."""

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megalemur.config.checkpoint import CheckpointConfig
from megalemur.config.checks import problems_of
from megalemur.config.data import DataConfig
from megalemur.config.duration import Duration
from megalemur.config.guard import GuardConfig
from megalemur.config.log import LogConfig
from megalemur.config.model import ModelConfig
from megalemur.config.optim import OptimConfig, ScheduleConfig
from megalemur.config.parallel import ParallelConfig
from megalemur.config.precision import PrecisionConfig
from megalemur.config.section import Section
from megalemur.config.watchdog import WatchdogConfig


class RunSettings(Section):
    """The run itself."""

    name: str
    """Name of the run."""
    steps: NonNegativeInt
    """Optimizer steps. 0 loads and saves: a Hugging Face directory goes through unchanged."""
    seed: NonNegativeInt = 1234
    """Seed of the data order, of dropout and of initial weights."""
    deterministic: bool = False
    """Deterministic kernels in torch, cuBLAS, NCCL and attention; slower on GPUs. Without it a resume on GPUs has
    equal samples and starts from equal state, but its bits then drift (docs/resume.md). CPU runs need no switch."""
    stop_at: PositiveInt | None = None
    """Stop after this step and save; the schedule still counts to `steps`. Unset: run to the end."""
    stop_before: Duration | None = None
    """How long before the end of the job to stop and save, as 20min, 90s or seconds: longer than a step and a save. The
    end comes from the batch system. Unset: run until a signal comes."""
    check_replicas_every: NonNegativeInt = 100
    """Steps between comparisons of what must be equal on several ranks (docs/guards.md); 0: never. A difference stops
    the run and names rank and tensor."""
    collective_timeout: PositiveFloat = 600.0
    """Seconds after which a collective that does not finish ends the process."""
    collect_garbage_every: PositiveInt = 100
    """Steps between Python garbage collections, on all ranks at the same step: no rank pauses alone."""


class RunConfig(Section):
    """A run file."""

    run: RunSettings
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optim: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()
    guard: GuardConfig = GuardConfig()
    data: DataConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    watchdog: WatchdogConfig = WatchdogConfig()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "RunConfig":
        problems = problems_of(dict(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def micro_batches(self) -> int:
        """Micro-batches a step on each replica."""
        return self.data.global_batch_size // (self.data.micro_batch_size * self.parallel.data)

    @property
    def tokens_per_step(self) -> int:
        """Tokens a step, over all replicas."""
        return self.data.global_batch_size * self.data.sequence_length

    @property
    def watchdog_timeout(self) -> float:
        """Seconds that a step may take."""
        return self.watchdog.timeout or self.run.collective_timeout / 2

    @property
    def last_step(self) -> int:
        """Step at which this run ends or pauses."""
        return min(self.run.steps, self.run.stop_at or self.run.steps)
