"""Where a run starts from and what it leaves behind."""

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from megalemur.config.section import Section


class CheckpointConfig(Section):
    """Checkpoints: Hugging Face directories with a trainer/ folder."""

    directory: Path
    """Holds step_NNNNNN directories. A run resumes from the newest one that verifies."""
    start_from: Path | None = None
    """Hugging Face Llama directory to start from when `directory` holds no checkpoint; every checkpoint of ours is one.
    Unset: from scratch."""
    load: Literal["weights", "all"] | None = None
    """What is taken from start_from. weights: a new run at step 0; of a checkpoint of ours, the fp32 masters. all: go
    on with the run found there, with its moments, counters and data position. Unset: weights, and a checkpoint that
    holds moments is refused: they are never dropped in silence."""
    save_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only at the end."""
    asynchronous: bool = True
    """Copy the state to host memory (12 bytes a parameter, over all ranks; `megalemur show-config` prints a rank's
    share) and write it while training goes on. false: training stands still until the checkpoint is on the disk."""
    keep: NonNegativeInt = 0
    """Newest checkpoints to keep; older ones are deleted once a newer one was read back. 0 keeps all."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of every so many steps stay for good, whatever `keep` says; 0: none."""
    keep_weights_every: NonNegativeInt = 0
    """Checkpoints of every so many steps keep their Hugging Face weights for good and lose masters and moments (six
    sevenths of the bytes) once `keep` newer ones stand; 0: none. Nothing can be resumed from one of these."""
    read_back: bool = True
    """Read each checkpoint back from the disk after its commit and compare every byte; one that differs is set aside
    and counts as a failed save. Reads as much as was written. false: nothing is ever deleted."""
    max_failed_saves: PositiveInt = 3
    """Saves that fail in a row, after which the run stops; training goes on after each before that."""
    export_dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """Width of the Hugging Face weights. source: that of start_from; the compute precision from scratch."""
    max_file_bytes: PositiveInt = 10_000_000_000
    """Largest Hugging Face weight file, in bytes; a larger tensor gets a file of its own."""
    weight_files: NonNegativeInt = 0
    """Hugging Face weight files at least, as near as whole tensors allow: each is written by one rank. 0: one a rank,
    as long as a file holds 64 MiB."""
    allow_changes: tuple[Literal["backend", "optimizer", "precision", "versions"], ...] = ()
    """What a resume may change although it is refused otherwise (docs/resume.md): backend, optimizer class, compute
    precision, versions of the libraries."""
