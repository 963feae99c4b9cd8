"""A run from its config to its last checkpoint: what `megalemur train` calls."""

import logging

from megalemur.config.run import RunConfig
from megalemur.observe.build import Standing, build_observers
from megalemur.observe.expectation import Expectation
from megalemur.observe.logs import setup_logging
from megalemur.parallel.groups import Place, check_world, join, leave, world_from_environment
from megalemur.supervise.pulse import Pulse, Section
from megalemur.supervise.signals import StopRequest
from megalemur.train.crash_loop import refuse_crash_loop
from megalemur.train.deterministic import use_deterministic_kernels
from megalemur.train.loop import run_loop
from megalemur.train.setup import build_run, preflight

_log = logging.getLogger(__name__)

_UNPROVEN = (
    "never run yet: several GPUs over NCCL, Transformer Engine, Apex, fp8; "
    "docs/gpu.md lists what was measured and what is due"
)

_NO_END = (
    "run.stop_before is set, but neither MEGALEMUR_JOB_END nor SLURM_JOB_END_TIME says when this job ends: the run "
    "goes on until a signal comes"
)


def train(
    config: RunConfig,
    stop: StopRequest | None = None,
    pulse: Pulse | None = None,
    *,
    expectation: Expectation | None = None,
) -> bool:
    """Train as the run file says. Called by every process of the run.

    Args:
        config: the run.
        stop: already listening; without one, signals end the process as they would any other.
        pulse: shared with a supervisor.
        expectation: a plan's figures, put beside the measured ones.

    Returns whether it was asked to stop before its last step; it has saved and can be started again.

    Raises:
        ValueError: settings that do not fit the processes, the files or each other.
        DataError, CheckpointError, NumericalStop, ReplicaError, CrashLoop: see their rooms.
    """
    stop, pulse = stop or StopRequest(), pulse or Pulse()
    check_world(config.parallel, world_from_environment()[1])
    if config.run.deterministic:
        use_deterministic_kernels()
    step = preflight(config)
    place = join(config.parallel, timeout_seconds=config.run.collective_timeout)
    setup_logging(place.label, place.rank)
    if config.run.stop_before is not None and stop.deadline is None and place.rank == 0:
        _log.warning(_NO_END)
    try:
        if step < config.last_step:
            refuse_crash_loop(config.checkpoint.directory, step, place)
        return _train(config, place, stop, pulse, expectation)
    finally:
        pulse.enter(Section.ENDING)
        leave()


def _train(config: RunConfig, place: Place, stop: StopRequest, pulse: Pulse, expectation: Expectation | None) -> bool:
    run = build_run(config, place)
    run.pulse = pulse
    _log.info("%s, at step %d of %d", run.origin.describe(), run.state.step, config.run.steps)
    if place.device.type == "cuda":
        _log.info(_UNPROVEN)
    observers = build_observers(
        config,
        rank=place.rank,
        label=place.label,
        first_step=run.state.step,
        epoch_samples={s.config.name: s.samples.samples_per_epoch for s in run.data.training.sources.values()},
        standing=Standing(lambda: run.saver.saved_step or 0, expectation),
    )
    try:
        stopped = run_loop(run, observers, stop)
        if stopped:
            _log.info("asked to stop: saved at step %d of %d, to be started again", run.state.step, config.run.steps)
        return stopped
    finally:
        pulse.enter(Section.ENDING)
        for observer in observers:
            observer.at_end()
