"""Shards to one data set: the units one after another, or their documents in a seeded order. Constant memory."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encode import Extent, Tally
from data_prep.errors import WorkError
from data_prep.inputs import Source
from data_prep.work import Work
from megalemur.data.indexed import IndexedFile
from megalemur.data.manifest import BadDocument, InputRecord
from megalemur.data.permutation import Permutation
from megalemur.data.writer import IndexedWriter

_BLOCK, _BLOCK_TOKENS = 1 << 14, 1 << 23  # documents and tokens that are gathered at once


class Joiner:
    """Appends finished units to the data set in the making; a context manager, which leaves nothing behind."""

    def __init__(self, work: Work, prefix: Path, vocab_size: int):
        """Begin an empty data set.

        Args:
            work: where the units lie.
            prefix: of the data set.
            vocab_size: ids are below it.
        """
        self.work = work
        self.writer = IndexedWriter(prefix, vocab_size=vocab_size, scratch=work.path / "joined")
        self._files: dict[str, int] = {}

    def __enter__(self) -> "Joiner":
        self.writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self._files.values():
            os.close(file)
        self.writer.__exit__(*error)

    def add(self, extent: Extent) -> None:
        """Append the next unit; it is digested again on the way.

        Raises:
            WorkError: its shard is no longer what was written; the next run does the unit again.
        """
        if not extent.tokens:
            return
        if not self.work.intact(extent):
            raise WorkError(
                f"{self.work.path / extent.shard} was damaged since it was written; run the same command again"
            )
        tokens, lengths = self.work.read(extent)
        if extent.shard not in self._files:
            self._files[extent.shard] = os.open(self.work.path / extent.shard, os.O_RDONLY)
        self.writer.add_extent(self._files[extent.shard], extent.start, tokens.view(self.writer.dtype), lengths)


def copy_shuffled(source: IndexedFile, seed: int, writer: IndexedWriter) -> None:
    """Append the documents in an order that is a function of (seed, number of documents)."""
    for numbers in shuffled_numbers(source.num_documents, seed):
        bounds = np.array([source.document_bounds(k, k + 1) for k in numbers.tolist()])
        lengths = bounds[:, 1] - bounds[:, 0]
        for first, stop in _within(lengths, _BLOCK_TOKENS):
            pieces = [source.tokens(a, b) for a, b in bounds[first:stop].tolist()]
            writer.add_many(np.concatenate(pieces), lengths[first:stop].astype(np.int32))


def shuffled_numbers(count: int, seed: int) -> Iterator[np.ndarray]:
    """Numbers of all documents in a seeded order, block by block."""
    permutation = Permutation(count, "documents", seed)
    for first in range(0, count, _BLOCK):
        yield permutation.many(np.arange(first, min(first + _BLOCK, count)))


def _within(lengths: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Runs of documents of at most `limit` tokens together; one that is longer alone is a run."""
    first, total = 0, 0
    for number, length in enumerate(lengths.tolist()):
        if number > first and total + length > limit:
            yield first, number
            first, total = number, 0
        total += length
    if first < len(lengths):
        yield first, len(lengths)


def input_records(
    sources: Sequence[Source], extents: Sequence[Extent], bad: Sequence[tuple[int, BadDocument]]
) -> tuple:
    """What became of each source that the extents touch."""
    sums: dict[int, Tally] = {}
    for extent in extents:
        for number, tally in extent.tallies.items():
            total = sums.setdefault(number, Tally())
            total.documents += tally.documents
            total.empty += tally.empty
            total.tokens += tally.tokens
            total.text_bytes += tally.text_bytes
    bad_of = Counter(number for number, _ in bad)
    return tuple(
        InputRecord(
            name=sources[number].name,
            bytes=sources[number].size,
            mtime_ns=int(sources[number].version) if sources[number].version.isdigit() else None,
            documents=total.documents,
            empty_documents=total.empty,
            bad=bad_of[number],
            tokens=total.tokens,
            text_bytes=total.text_bytes,
        )
        for number, total in sorted(sums.items())
    )


def part_prefix(prefix: Path, part: int, parts: int) -> Path:
    """Where one part of a data set lies."""
    return prefix.with_name(f"{prefix.name}.part-{part:05d}-of-{parts:05d}")
