"""A checkpoint of the run as it stands."""

from pathlib import Path
from typing import Any

import torch

from megalemur.checkpoint.directory import prune
from megalemur.checkpoint.save import Contents, save_checkpoint
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


def save_run(run: Run) -> Path:
    """Save, then delete what retention no longer wants. A collective.

    Raises:
        CheckpointError: on every rank alike.
    """
    settings = run.config.checkpoint
    group = run.place.cpu_group if run.place.world_size > 1 else None
    path = save_checkpoint(settings.directory, contents_of(run), group=group, max_file_bytes=settings.max_file_bytes)
    if run.place.rank == 0:
        prune(settings.directory, settings.keep)
    return path
