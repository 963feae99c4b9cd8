"""Rules about checkpoints, time limits and logs."""

from typing import Any

from megalemur.plan.lint.finding import Texts
from megalemur.plan.lint.scale import WRITE_BYTES_PER_SECOND, checkpoint_bytes, size, step_seconds

_AT_RISK_HOURS, _MANY_BYTES = 4.0, 10e12
_PATIENCE_SECONDS, _HASTE_SECONDS = 3600.0, 60.0


def much_work_at_risk(run: Any, model: Any, parallel: Any, data: Any, checkpoint: Any) -> Texts:
    """So long from one save to the next that a crash costs hours.
    https://github.com/huggingface/accelerate/issues/3400"""
    every = checkpoint.save_every or run.steps
    seconds = step_seconds(model, parallel, data)
    hours = min(every, run.steps) * seconds / 3600
    if hours > _AT_RISK_HOURS:
        yield (
            f"checkpoint.save_every={checkpoint.save_every}: a crash costs up to {hours:,.1f} hours (on H100s at 40 % "
            f"of their peak); use checkpoint.save_every={max(1, int(3600 / seconds))} for an hour"
        )


def checkpoints_pile_up(run: Any, model: Any, checkpoint: Any) -> Texts:
    """Every checkpoint is kept, and they come to more than 10 TB.
    https://github.com/allenai/OLMo-core/pull/694"""
    count = run.steps // checkpoint.save_every if checkpoint.save_every else 1
    total = count * checkpoint_bytes(model)
    if checkpoint.keep == 0 and total > _MANY_BYTES:
        yield (
            f"checkpoint.keep=0 keeps all {count} checkpoints of {size(checkpoint_bytes(model))} each, {size(total)}; "
            "use checkpoint.keep=3, and checkpoint.keep_weights_every for those that are to be looked at later"
        )


def saves_not_read_back(checkpoint: Any) -> Texts:
    """Checkpoints are not read back: damage shows when it is too late. Measured here: most readers load a flipped bit
    without a word (docs/reliability.md)."""
    if not checkpoint.read_back:
        yield (
            "checkpoint.read_back=false: nobody looks whether the disk holds what was written before it is needed; use "
            "checkpoint.read_back=true"
        )


def stop_before_shorter_than_a_save(run: Any, model: Any, parallel: Any, data: Any, checkpoint: Any) -> Texts:
    """Less time between the stop and the end of the job than a step and a save take.
    https://github.com/swiss-ai/Megatron-LM/issues/3"""
    if run.stop_before is None:
        return
    nodes = max(1, parallel.world_size // 8)
    write = checkpoint_bytes(model) / (nodes * WRITE_BYTES_PER_SECOND)
    needed = step_seconds(model, parallel, data) + write * (2 if checkpoint.read_back else 1)
    if run.stop_before < needed:
        yield (
            f"run.stop_before={run.stop_before:g} s is less than a step and a save, about {needed:,.0f} s at 1 GB/s a "
            f"node; use run.stop_before={2 * int(needed) + 60}"
        )


def start_in_own_directory(checkpoint: Any) -> Texts:
    """The run's own checkpoints lie where it starts from: a restart could not tell them apart.
    https://github.com/mlfoundations/open_clip/issues/180"""
    start, own = checkpoint.start_from, checkpoint.directory
    if start is not None and start == own:
        yield (
            f"checkpoint.start_from and checkpoint.directory both are {own}; use another checkpoint.directory, "
            "and leave "
            "start_from out to resume from the newest checkpoint there"
        )


def stalls_not_watched(watchdog: Any, parallel: Any) -> Texts:
    """A rank that hangs is ended by the time limits of collectives only, and nobody names it.
    https://github.com/pytorch/pytorch/issues/97191"""
    if not watchdog.enabled and parallel.world_size > 1:
        yield "watchdog.enabled=false: a rank that hangs is neither noticed nor named; use watchdog.enabled=true"


def hang_held_too_long(run: Any, watchdog: Any, parallel: Any) -> Texts:
    """A hang holds all GPUs for more than an hour before it is ended.
    https://github.com/NVIDIA-NeMo/Speech/issues/8441"""
    limit = (watchdog.timeout or run.collective_timeout / 2) if watchdog.enabled else run.collective_timeout
    if limit > _PATIENCE_SECONDS and parallel.world_size > 1:
        lost = limit / 3600 * parallel.world_size
        yield (
            f"a hang is ended after {limit:g} s (watchdog.timeout, or half of run.collective_timeout="
            f"{run.collective_timeout:g}) and costs {lost:,.0f} GPU-hours; use watchdog.timeout=900 or so"
        )


def collectives_in_haste(run: Any, parallel: Any) -> Texts:
    """A time limit of collectives that a slow file system or a first compilation exceeds.
    https://github.com/meta-pytorch/torchtune/issues/2093"""
    if run.collective_timeout < _HASTE_SECONDS and parallel.world_size > 8:
        yield (
            f"run.collective_timeout={run.collective_timeout:g} s ends a run of {parallel.world_size} processes "
            "when one "
            "of them reads slowly for once; use run.collective_timeout=600"
        )


def stop_at_beyond_the_end(run: Any) -> Texts:
    """A pause behind the last step, without any effect.
    https://github.com/huggingface/accelerate/issues/1791"""
    if run.stop_at is not None and run.stop_at > run.steps:
        yield (
            f"run.stop_at={run.stop_at} is beyond run.steps={run.steps} and has no effect; raise run.steps, or "
            "leave it out"
        )


def profile_never_taken(run: Any, parallel: Any, log: Any) -> Texts:
    """A profiler window or rank that the run does not have: no trace is written.
    https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/5819 https://github.com/google/tunix/pull/2088"""
    if log.profiler is None:
        return
    last = min(run.steps, run.stop_at or run.steps)
    if log.profiler.start_step + log.profiler.steps > last:
        yield (
            f"log.profiler: steps {log.profiler.start_step + 1} to {log.profiler.start_step + log.profiler.steps} are "
            f"not all taken by a run that ends at step {last}; use start_step={max(0, last - log.profiler.steps)} "
            "or less"
        )
    beyond = [rank for rank in log.profiler.ranks if rank >= parallel.world_size]
    if beyond:
        yield f"log.profiler.ranks has {beyond}, but the ranks are 0 to {parallel.world_size - 1}"


RULES = (
    ("warning", much_work_at_risk),
    ("warning", checkpoints_pile_up),
    ("warning", saves_not_read_back),
    ("warning", stop_before_shorter_than_a_save),
    ("error", start_in_own_directory),
    ("warning", stalls_not_watched),
    ("warning", hang_held_too_long),
    ("warning", collectives_in_haste),
    ("warning", stop_at_beyond_the_end),
    ("warning", profile_never_taken),
)
