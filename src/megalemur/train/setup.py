"""Builds a run from its config, part by part; introduces model, data, optim and checkpoint to each other."""

import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from megalemur.checkpoint.errors import DamagedCheckpoint
from megalemur.checkpoint.saver import Saver
from megalemur.config.run import RunConfig
from megalemur.data.batches import Portion
from megalemur.data.feed import Data, build_data
from megalemur.data.history import History
from megalemur.model.backend import resolve_backend
from megalemur.model.llama import build_chunks, model_segments
from megalemur.optim.adamw import class_name
from megalemur.optim.gradients import wrap_chunks
from megalemur.optim.optimizer import Optimizer
from megalemur.parallel.groups import Place
from megalemur.parallel.seeds import seed_step
from megalemur.parallel.state import Piece, Segment, pieces_of
from megalemur.supervise.pulse import Pulse
from megalemur.train.forward import ForwardStep
from megalemur.train.guard import Guard, GuardState
from megalemur.train.origin import Origin, fill_pieces
from megalemur.train.pace import ReadyClock
from megalemur.train.replicas import ReplicaCheck, circles_of, norms_of
from megalemur.train.resume import Changes, report_changes
from megalemur.train.start import Start, Starts
from megalemur.train.state import RunState
from megalemur.train.step import Engine, Shape


@dataclass
class Run:
    """Everything that the loop works with."""

    config: RunConfig
    place: Place
    engine: Engine
    data: Data
    state: RunState
    origin: Origin
    segments: dict[torch.nn.Parameter, list[Segment]]
    record: dict[str, Any]
    """Facts about this run, as its checkpoints carry them."""
    clock: ReadyClock
    changes: Changes
    """What resumes have changed about the run."""
    saver: Saver
    pulse: Pulse = field(default_factory=Pulse)
    """Tells this rank's supervisor, where there is one, what the rank is doing."""

    @property
    def portion(self) -> Portion:
        """This replica's part of a global batch."""
        data, parallel = self.config.data, self.config.parallel
        return Portion(self.place.dp_rank, parallel.data, data.micro_batch_size, data.global_batch_size)

    def pieces(self) -> list[Piece]:
        """The training state on this rank, in Hugging Face coordinates; writing to the tensors changes it."""
        return pieces_of(self.engine.optimizer.owned(), self.segments)


def build_run(config: RunConfig, place: Place) -> Run:
    """Build everything, load the weights, and leave the run ready for its next step.

    Raises:
        ValueError, DataError, CheckpointError: what the run file names does not fit, on every rank alike.
    """
    backend = resolve_backend(config.model)
    record = build_record(config, backend)
    starts = Starts(config, record, place.cpu_group)
    origin, state, history, changes = starts.next()
    data = build_run_data(config, state, history)
    seed_step(config.run.seed, state.step, place.pp_rank, place.dp_rank)
    chunks = build_chunks(config.model, config.parallel, config.precision, deterministic=config.run.deterministic)
    segments = model_segments(chunks, config.model)
    clock = ReadyClock(place.device)
    wrapped = wrap_chunks(chunks, config.parallel, config.precision, backward_done=clock.ready)
    engine = Engine(
        chunks=wrapped,
        optimizer=Optimizer(wrapped, config.optim, config.parallel, config.precision),
        forward=build_forward(config, place.device, backend),
        guard=Guard(config.guard),
        shape=build_shape(config),
        place=place,
    )
    saver = build_saver(config, place)
    run = Run(config, place, engine, data, state, origin, segments, record, clock, changes, saver)
    engine.guard = build_guard(run)
    _load(run, starts)
    report_changes(run.changes)
    return run


def restore(run: Run) -> None:
    """Bring a run back to its newest good checkpoint, in this process: parameters, moments, counters, data, guard.

    A collective. `run.data` and `run.state` are others afterwards; whoever reads ahead in the old data closes them.

    Raises:
        NoGoodCheckpoint, ValueError, DataError, CheckpointError: as `build_run`.
    """
    run.saver.wait()
    starts = Starts(run.config, run.record, run.place.cpu_group)
    _adopt(run, starts.next())
    _load(run, starts)


def _load(run: Run, starts: Starts) -> None:
    """Read the run's start into this rank's state; while damage is found in it, the next older one."""
    while True:
        try:
            fill_pieces(run.origin, run.config, run.pieces(), run.place.cpu_group)
            break
        except DamagedCheckpoint as error:
            starts.pass_over(error)
            _adopt(run, starts.next())
    run.engine.optimizer.publish(run.state.updates)
    run.saver.goes_on_from(run.origin.own_checkpoint(run.config.checkpoint.directory))


def _adopt(run: Run, start: Start) -> None:
    """Take over a start's position; nothing is loaded yet."""
    run.origin, run.state, history, run.changes = start
    run.data = build_run_data(run.config, run.state, history)
    run.engine.guard = build_guard(run)


def build_guard(run: Run) -> Guard:
    """The guard of a run at its present step, with what the checkpoint says that it had seen."""
    saved = GuardState.from_json((run.origin.state or {}).get("guard"))
    engine, place = run.engine, run.place
    replicas = ReplicaCheck(
        place,
        lambda: circles_of(run.config, place, engine.chunks, engine.optimizer, run.segments),
        norms_of(run.config, engine.chunks),
        every=run.config.run.check_replicas_every,
        steps_taken=run.state.step,
    )
    return Guard(
        run.config.guard,
        rejected_in_a_row=run.state.skipped_in_a_row,
        state=GuardState() if run.changes.move_losses else saved,
        compare_replicas=replicas.when_due,
    )


def preflight(config: RunConfig) -> int:
    """Refuse what the run file's own files make impossible, before any process group exists.

    Every process looks at the same files and so refuses alike. Returns the step from which the run will go on.

    Raises:
        ValueError, DataError, CheckpointError: as `build_run`.
    """
    start = Starts(config, build_record(config, resolve_backend(config.model))).next()
    build_run_data(config, start.state, start.history)
    return start.state.step


def build_run_data(config: RunConfig, state: RunState, history: History | None) -> Data:
    """Training and validation sources, opened and checked."""
    remaining = max(0, config.run.steps - state.step)
    return build_data(
        config.data,
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
        total_samples=state.samples + remaining * config.data.global_batch_size,
        history=history,
        drawn=state.samples,
    )


def build_saver(config: RunConfig, place: Place) -> Saver:
    """What writes this run's checkpoints."""
    return Saver(config.checkpoint, place.saver_group if place.world_size > 1 else None)


def build_forward(config: RunConfig, device: torch.device, backend: str) -> ForwardStep:
    """The forward step of this run's micro-batches."""
    own_attention = backend == "torch"  # walks over the borders on the host
    borders_device = torch.device("cpu") if own_attention else device
    return ForwardStep(device, packed=config.data.document_mask == "intra", borders_device=borders_device)


def build_shape(config: RunConfig) -> Shape:
    """Rows of a micro-batch in flight; packed ones travel as one long sequence."""
    data = config.data
    if data.document_mask == "intra":
        return Shape(data.micro_batch_size * data.sequence_length, 1)
    return Shape(data.sequence_length, data.micro_batch_size)


def build_record(config: RunConfig, backend: str) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it."""
    names = ["megalemur", "torch", "megatron-core"] + (["transformer-engine"] if backend != "torch" else [])
    return {
        "layout": config.parallel.model_dump(mode="json"),
        "backend": backend,
        "optimizer": class_name(config.optim.kind),
        "precision": config.precision.dtype,
        "device": "cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }
