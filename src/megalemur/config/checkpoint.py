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
    """Hugging Face Llama directory to start from when `directory` holds no checkpoint; every checkpoint of ours is one,
    and then its fp32 masters are taken. Unset: from scratch."""
    save_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: NonNegativeInt = 0
    """Newest checkpoints to keep; older ones are deleted after a newer commit. 0 keeps all."""
    export_dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """Width of the Hugging Face weights. source: that of start_from; the compute precision from scratch."""
    max_file_bytes: PositiveInt = 10_000_000_000
    """Largest Hugging Face weight file, in bytes; a larger tensor gets a file of its own."""
    allow_changes: tuple[Literal["backend", "optimizer", "precision", "versions"], ...] = ()
    """What a resume may change although it is refused otherwise (docs/resume.md): backend, optimizer class, compute
    precision, versions of the libraries."""
