"""Which tokens, in which shares, in batches of which size."""

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from megalemur.config.section import Section


class SourceConfig(Section):
    """One indexed data set: PREFIX.bin and PREFIX.idx."""

    name: str
    """Short name, for metrics and the ledger; unique in its list."""
    path: Path
    """Prefix of the .bin and .idx files."""
    weight: PositiveFloat = 1.0
    """Share of the samples, relative to the other sources' weights."""
    kind: Literal["windows"] = "windows"
    """windows: the documents as one continuous stream, cut every sequence_length tokens."""
    max_epochs: PositiveFloat | None = None
    """Passes over this source that the run may make; more is refused before the start. Unset: any number."""


class DataConfig(Section):
    """Batches and their sources."""

    sequence_length: PositiveInt
    """Tokens a sample sees (s); a window is s + 1 tokens, the last one shared with the next window."""
    micro_batch_size: PositiveInt = 1
    """Samples that one process takes through the model at once."""
    global_batch_size: PositiveInt
    """Samples a step, over all replicas."""
    sources: tuple[SourceConfig, ...]
    """Training sources."""
    validation: tuple[SourceConfig, ...] = ()
    """Validation sources; each reports its own loss."""
    validate_every: NonNegativeInt = 0
    """Steps between validations; 0: never. The last step is always validated when this is set."""
    validation_samples: PositiveInt = 128
    """Samples a source a validation, always the same ones; a last global batch is filled up with samples that do not
    count, so the loss is the same in every layout."""
    document_mask: Literal["none", "intra"] = "none"
    """none: a token attends to the whole window before it. intra: only to its own document, and positions
    start again at each document."""
    tokenizer: Path | None = None
    """SentencePiece model or Hugging Face tokenizer directory that made the sources; copied into each checkpoint."""
