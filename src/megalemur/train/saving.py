"""A checkpoint of the run as it stands: begun, waited for, reported."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from megalemur.checkpoint.save import Contents
from megalemur.config.load import dump_run
from megalemur.model.hf_config import generation_config_json, hf_config_json
from megalemur.model.names import hf_shapes
from megalemur.train.setup import Run

_WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def contents_of(run: Run) -> Contents:
    """What a checkpoint of this step holds, as this rank sees it."""
    shapes = hf_shapes(run.config.model)
    return Contents(
        step=run.state.step,
        pieces=run.pieces(),
        shapes=shapes,
        dtypes=run.origin.dtypes,
        files=_files(run),
        state=_trainer_state(run),
        record=run.record,
    )


def _files(run: Run) -> dict[str, bytes]:
    widths = {_WORDS[dtype] for dtype in run.origin.dtypes.values()}
    # config.json knows one width; norms alone may be wider
    width = min(widths, key=lambda word: (word == "float32", word))
    return {
        "generation_config.json": generation_config_json(),
        **run.origin.files,
        "config.json": hf_config_json(run.config.model, dtype=width, source=run.origin.hf_config),
        "run.yaml": dump_run(run.config).encode(),
    }


def _trainer_state(run: Run) -> dict[str, Any]:
    training = run.data.training
    return {
        "run": run.state.to_json(),
        "data": training.history.to_json(),
        "ledger": training.ledger(run.state.samples),
        "guard": run.engine.guard.state.model_dump(mode="json"),
        "changes": run.changes.to_json(),
    }


def prepare_saving(run: Run) -> None:
    """Make room for the copies of background saves, before anything is trained. A collective.

    Raises:
        CheckpointError: on every rank alike: too little memory, or a state that cannot be saved.
    """
    run.saver.prepare(contents_of(run))


def begin_save(run: Run) -> Path:
    """Save, in the background where the run file says so; where the checkpoint will stand. A collective.

    A save that fails is reported by `saves_ended`; training goes on.
    """
    return run.saver.save(contents_of(run))


def save_run(run: Run) -> Path:
    """Save and wait until the checkpoint stands. A collective.

    Raises:
        CheckpointError: on every rank alike.
    """
    path = begin_save(run)
    finish_save(run)
    return path


def finish_save(run: Run) -> None:
    """Wait until the checkpoint of the last `begin_save` stands. A collective.

    Raises:
        CheckpointError: on every rank alike: it does not.
    """
    run.saver.wait()
    run.saver.raise_last()


class SavesEnded(NamedTuple):
    """The saves that ended since the last step, as this rank saw it."""

    seconds: float
    """Their time from beginning to end, most of it in the background."""
    failed: int


def saves_ended(run: Run) -> SavesEnded:
    """Of this rank, since the last call."""
    ended = run.saver.ended()
    return SavesEnded(sum(save.seconds for save in ended), sum(save.error is not None for save in ended))
