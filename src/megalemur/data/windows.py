"""Samples of one source: which tokens of the stream the i-th one is. Kind `windows`: the stream as a ring, cut evenly.

Legend: s sequence length, T tokens in the stream.
"""

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from megalemur.data.indexed import IndexedFile
from megalemur.data.permutation import Permutation, draw


class Span(NamedTuple):
    """Tokens [start, stop) of a stream."""

    start: int
    stop: int


class SampleSource(Protocol):
    """What the order of samples needs to know of a source, of whatever kind."""

    file: IndexedFile

    @property
    def samples_per_epoch(self) -> int:
        """Samples until every one has been dealt once."""

    def spans(self, i: int) -> list[Span]:
        """The i-th sample, i counting on over epochs: s + 1 tokens in one or more spans, each a border of documents."""


class Windows:
    """Cuts a stream into N = T // s windows an epoch, each of s + 1 tokens: the last is shared with the next window.

    The stream is a ring. Window j of epoch e is the tokens at offset(e) + j s + [0 .. s], modulo T; a new offset each
    epoch, and a new permutation of its windows, both functions of (seed, digest, epoch). So each epoch uses N s tokens
    once as labels, and T mod s tokens not at all: others in each epoch, fewer than one window. Documents are cut where
    windows end. A window across the end of the file goes on at its beginning, and that is a border of documents.
    """

    def __init__(self, file: IndexedFile, sequence_length: int, *, seed: int | None):
        """Set up; reads nothing but, with a seed, the file's digest.

        Args:
            file: the stream.
            sequence_length: s.
            seed: of offsets and permutations; None: as in the file, from its beginning, every epoch alike.

        Raises:
            ValueError: the stream is shorter than one window.
        """
        if file.num_tokens < sequence_length + 1:
            raise ValueError(
                f"{file.prefix} has {file.num_tokens} tokens, less than one window of data.sequence_length + 1 = "
                f"{sequence_length + 1}; add text or use a shorter data.sequence_length"
            )
        self.file = file
        self._s, self._total = sequence_length, file.num_tokens
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._seed = seed

    @property
    def samples_per_epoch(self) -> int:
        """N = T // s."""
        return self._total // self._s

    def _make_epoch(self, epoch: int) -> tuple[int, Permutation]:
        """Offset of the cuts and order of the windows."""
        key = (self._seed or 0, self.file.digest, epoch)
        return draw("offset", *key) % self._total, Permutation(self.samples_per_epoch, *key)

    def spans(self, i: int) -> list[Span]:
        """One span, or two where the window goes over the end of the stream."""
        epoch, j = divmod(i, self.samples_per_epoch)
        if self._seed is None:
            start = j * self._s
        else:
            offset, permutation = self._epoch(epoch)
            start = (offset + permutation(j) * self._s) % self._total
        stop = start + self._s + 1
        if stop <= self._total:
            return [Span(start, stop)]
        return [Span(start, self._total), Span(0, stop - self._total)]


class Sample(NamedTuple):
    """The tokens of one sample."""

    tokens: np.ndarray
    """[s + 1], int64."""
    borders: np.ndarray
    """Positions in 1 .. s at which another document begins, rising, int64."""


def read_sample(source: SampleSource, i: int) -> Sample:
    """Read the i-th sample of a source: a copy, so nothing holds on to the file's pages."""
    tokens, borders, length = [], [], 0
    for start, stop in source.spans(i):
        tokens.append(source.file.tokens(start, stop))
        borders += [np.array([length]), source.file.document_starts(start, stop) - start + length]
        length += stop - start
    inside = np.unique(np.concatenate(borders))
    return Sample(np.concatenate(tokens).astype(np.int64), inside[inside > 0])
