"""What a run says, and where."""

from pathlib import Path

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from megalemur.config.section import Section


class ProfilerConfig(Section):
    """A window of steps recorded with torch.profiler, one trace a rank."""

    start_step: NonNegativeInt
    """Steps taken before the first recorded one: 10 records from the eleventh on."""
    steps: PositiveInt = 2
    """Steps recorded."""
    ranks: tuple[NonNegativeInt, ...] = (0,)
    """Ranks that record."""


class LogConfig(Section):
    """Metrics to the terminal, to JSON lines and to TensorBoard."""

    directory: Path
    """Holds metrics.jsonl, tensorboard/, profiler traces and memory snapshots."""
    every: PositiveInt = 1
    """Steps between metric records. Each record costs one small collective (step times of all ranks)."""
    tensorboard: bool = True
    """Also write TensorBoard events."""
    profiler: ProfilerConfig | None = None
    """Record a window of steps. Unset: never."""
    memory_snapshot: bool = False
    """CUDA: record allocations and write a snapshot when a process runs out of memory."""
    peak_teraflops: PositiveFloat | None = None
    """TFLOP/s of one device, for model-FLOP utilisation. Unset: known GPUs by name, none on CPU."""
