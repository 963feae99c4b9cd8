"""Back to the last good checkpoint inside the process, and past the samples that made it necessary.

What follows is what a restart from that checkpoint with the same history would do, bit for bit.
"""

import logging
from dataclasses import replace
from pathlib import Path

from megalemur.checkpoint.load import agree_on_newest
from megalemur.config.guard import GuardConfig
from megalemur.observe.observer import Event
from megalemur.train.guard import NumericalStop
from megalemur.train.origin import find_origin
from megalemur.train.resume import changes_at_resume
from megalemur.train.setup import Run, build_guard, build_run_data, load_state, position_of
from megalemur.train.state import RunState

_log = logging.getLogger(__name__)


def roll_back(run: Run) -> None:
    """Load the newest checkpoint that verifies, and pass over the samples of the rejected steps. A collective.

    Deterministic: a process that ends before the next save and is started again takes the same steps, rejects the same
    ones, and rolls back to the same place.

    Raises:
        NumericalStop: on all ranks alike: there have been guard.max_rollbacks already, or there is no checkpoint.
        CheckpointError, ValueError: the checkpoint cannot be loaded, or the rest of the data is not enough.
    """
    check_patience(run.config.guard, run.state)
    path = _last_good(run)
    if path is None:
        raise NumericalStop(
            f"{_said(run.state)}, and {run.config.checkpoint.directory} holds no checkpoint to go back to; lower "
            "optim.learning_rate, look at the data, or set checkpoint.save_every"
        )
    event = _return_to(run, path)
    _log.info(event.text)
    run.engine.guard.events.append(event)


def check_patience(limits: GuardConfig, state: RunState) -> None:
    """Refuse a rollback beyond guard.max_rollbacks.

    Raises:
        NumericalStop: naming what to do.
    """
    if state.rollbacks >= limits.max_rollbacks:
        raise NumericalStop(
            f"{_said(state)}, and the run has been rolled back {state.rollbacks} times (guard.max_rollbacks="
            f"{limits.max_rollbacks}); lower optim.learning_rate, look at the data from sample {state.rejected_from} "
            "on, or raise guard.max_rollbacks to go on"
        )


def _said(state: RunState) -> str:
    return f"{state.skipped_in_a_row} steps in a row, up to step {state.step}, were rejected"


def _last_good(run: Run) -> Path | None:
    """The one place where a rollback looks for checkpoints. A save under way has to be waited for here."""
    return agree_on_newest(run.config.checkpoint.directory, run.place.cpu_group).path


def _return_to(run: Run, path: Path) -> Event:
    """Everything as a restart from `path` would have it, and the samples of the rejected steps skipped."""
    left, history = run.state, run.data.training.history
    run.changes = changes_at_resume(run.config, path, run.record)
    run.origin = find_origin(run.config, path)
    state, _ = position_of(run.origin)
    first = max(left.rejected_from, state.samples)
    # the history in memory, not the checkpoint's: it holds what earlier rollbacks to the same place passed over
    skipping = history.with_skip(state.samples, first, left.samples)
    run.state = replace(state, skipped_in_a_row=0, rejected_from=0, rollbacks=left.rollbacks + 1)
    run.data = build_run_data(run.config, run.state, skipping)
    run.engine.guard = build_guard(run)
    load_state(run)
    facts: dict[str, bool | int | float | str] = {
        "from_step": left.step,
        "to_step": run.state.step,
        "checkpoint": str(path),
        "first_sample": first,
        "samples_skipped": left.samples - first,
        "rollbacks": run.state.rollbacks,
    }
    text = (
        f"from step {left.step} back to {path}; samples {first} to {left.samples - 1} are passed over "
        f"(rollback {run.state.rollbacks} of at most {run.config.guard.max_rollbacks})"
    )
    return Event("rollback", text, facts)
