"""A run from its config to its last checkpoint: what `megalemur train` calls."""

import logging

from megalemur.config.run import RunConfig
from megalemur.observe.build import build_observers
from megalemur.observe.logs import setup_logging
from megalemur.parallel.groups import Place, check_world, join, leave, world_from_environment
from megalemur.train.agreement import StopRequest
from megalemur.train.deterministic import use_deterministic_kernels
from megalemur.train.loop import run_loop
from megalemur.train.setup import build_run, preflight

_log = logging.getLogger(__name__)

_UNPROVEN = (
    "never run yet: several GPUs over NCCL, Transformer Engine, Apex, fp8; "
    "docs/gpu.md lists what was measured and what is due"
)


def train(config: RunConfig) -> None:
    """Train as the run file says. Called by every process of the run.

    Raises:
        ValueError: settings that do not fit the processes, the files or each other.
        DataError, CheckpointError, NumericalStop, ReplicaError: see their rooms.
    """
    check_world(config.parallel, world_from_environment()[1])
    if config.run.deterministic:
        use_deterministic_kernels()
    preflight(config)
    with StopRequest() as stop:
        place = join(config.parallel, timeout_seconds=config.run.collective_timeout)
        setup_logging(place.label, place.rank)
        try:
            _train(config, place, stop)
        finally:
            leave()


def _train(config: RunConfig, place: Place, stop: StopRequest) -> None:
    run = build_run(config, place)
    _log.info("%s, at step %d of %d", run.origin.describe(), run.state.step, config.run.steps)
    if place.device.type == "cuda":
        _log.info(_UNPROVEN)
    observers = build_observers(
        config,
        rank=place.rank,
        label=place.label,
        first_step=run.state.step,
        epoch_samples={s.config.name: s.samples.samples_per_epoch for s in run.data.training.sources.values()},
    )
    try:
        run_loop(run, observers, stop)
    finally:
        for observer in observers:
            observer.at_end()
