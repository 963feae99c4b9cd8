"""A destination before a byte of it is written: its files, and where each box of each tensor goes in them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints_tools.regions import Key, Regions
from megalemur.checkpoint.digests import FileEntry


class Frame(NamedTuple):
    """Bytes of a file that are no tensor's: a header, a record of an archive."""

    offset: int
    data: bytes


class Stretch(NamedTuple):
    """Bytes of a file that were written in one piece, and their CRC-32 as zip archives have it."""

    offset: int
    length: int
    crc: int


@dataclass(frozen=True)
class Written:
    """What was seen of the bytes of a destination while they were written."""

    entries: Mapping[str, FileEntry] = field(default_factory=dict)
    """File to digests, where the layout asked for them."""
    stretches: Mapping[str, Sequence[Stretch]] = field(default_factory=dict)
    """File to stretches in the order of their bytes, where the layout asked for them."""


def _nothing(directory: Path, written: Written) -> None:
    """Most files are complete once their bytes are."""


@dataclass(frozen=True)
class Layout:
    """What a format makes of some weights. A tensor's box may go to several places, and not all boxes of a file need to
    be a tensor's: bytes that nobody writes are zero."""

    format: str
    regions: Regions
    """Rows of a region lie one behind the other."""
    sizes: Mapping[str, int]
    """Bytes of each file with tensors."""
    units: Sequence[Sequence[Key]]
    """Tensors that one worker writes, one behind the other, in the order of rows; every tensor once. A unit that was
    finished is not written again after a crash, so it should be worth an fsync and not hours."""
    frames: Mapping[str, Sequence[Frame]] = field(default_factory=dict)
    small_files: Mapping[str, bytes] = field(default_factory=dict)
    digest_files: bool = False
    """Digest every file by chunk: its frames first, then its regions in the order of their bytes, one unit a file."""
    crc: bool = False
    """Note the CRC-32 of every stretch."""
    finish: Callable[[Path, Written], None] = _nothing
    """Write, into the directory, what can only be known once the tensors are written."""


@dataclass(frozen=True)
class Options:
    """What a user may ask of a destination."""

    dtype: torch.dtype | None = None
    """None: as the source has it."""
    max_shard_bytes: int = 5_000_000_000
    tensor: int = 1
    """Layout of megatron-legacy: tensor-parallel ranks, pipeline stages, chunks a stage."""
    pipeline: int = 1
    chunks: int = 1
    transformer_engine: bool = False
    """megatron: names of Transformer Engine's layers instead of megatron-core's local ones."""
    pad_vocab_to: int = 128
    """megatron: the vocabulary is padded to a multiple of this times the tensor-parallel size."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Step, and others that the source knows."""
