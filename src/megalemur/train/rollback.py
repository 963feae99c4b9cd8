"""Back to the last good checkpoint inside the process, and past the samples that made it necessary.

What follows is what a restart from that checkpoint with the same history would do, bit for bit.
"""

import logging
from dataclasses import replace
from pathlib import Path

from megalemur.config.guard import GuardConfig
from megalemur.data.history import History
from megalemur.observe.observer import Event
from megalemur.train.guard import NumericalStop
from megalemur.train.setup import Run, build_guard, build_run_data, restore
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
    left, history = run.state, run.data.training.history
    restore(run)
    path = run.origin.own_checkpoint(run.config.checkpoint.directory)
    if path is None:
        raise NumericalStop(
            f"{_said(left)}, and {run.config.checkpoint.directory} holds no checkpoint to go back to; lower "
            "optim.learning_rate, look at the data, or set checkpoint.save_every"
        )
    event = _skip(run, left, history, path)
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


def _skip(run: Run, left: RunState, history: History, path: Path) -> Event:
    """Pass over the samples of the rejected steps, in the history that the run had when it left."""
    first = max(left.rejected_from, run.state.samples)
    # the history in memory, not the checkpoint's: it holds what earlier rollbacks to the same place passed over
    skipping = history.with_skip(run.state.samples, first, left.samples)
    run.state = replace(run.state, skipped_in_a_row=0, rejected_from=0, rollbacks=left.rollbacks + 1)
    run.data = build_run_data(run.config, run.state, skipping)
    run.engine.guard = build_guard(run)
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
