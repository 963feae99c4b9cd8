"""Reads and writes token files in megatron-core's MMIDIDX version 1: PREFIX.bin (tokens) and PREFIX.idx (borders).

numpy only. Refuses a pair whose header, lengths, pointers and sizes do not agree, before any token is read.
"""

import mmap
import os
import struct
from bisect import bisect_left
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from megalemur.config.plain_files import open_plain
from megalemur.data.errors import DamagedDataError, DataError, MissingDataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
# magic, version, dtype code, sequences, documents + 1
HEADER = struct.Struct("<9sQBQQ")
INTEGER_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOAT_CODES = {6, 7}
_BLOCK = 1 << 20  # entries checked at once: constant memory, however many documents there are
_SAMPLED_BYTES = 1 << 16
_SAMPLES = 64


def optimal_dtype(vocab_size: int) -> np.dtype:
    """Smallest dtype megatron-core would choose: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def bin_path(prefix: Path | str) -> Path:
    """The token file of a prefix."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    """The index file of a prefix."""
    return Path(f"{prefix}.idx")


def prefix_of(path: Path) -> Path:
    """The prefix that a user means who names one of its files, as a glob of *.idx does."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


class _Header(NamedTuple):
    dtype: np.dtype
    sequences: int
    borders: int
    """Documents + 1."""


def _map(path: Path) -> mmap.mmap | bytes:
    """The file's bytes, mapped; an empty file cannot be mapped and has none."""
    try:
        with os.fdopen(open_plain(path), "rb") as stream:
            empty = stream.seek(0, 2) == 0
            return b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        other = idx_path if path.suffix == ".bin" else bin_path
        beside = other(path.with_suffix("")).exists()
        reason = (
            f"{other(path.with_suffix('')).name} is there, so the data set is incomplete: build it again"
            if beside
            else "give the prefix of a .bin and .idx pair, without the ending"
        )
        raise MissingDataError(f"{path}: no such file; {reason}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _read_header(raw: mmap.mmap | bytes, path: Path) -> _Header:
    if len(raw) < HEADER.size:
        raise DamagedDataError(f"{path}: {len(raw)} bytes, less than the header's {HEADER.size}; build it again")
    magic, version, code, sequences, borders = HEADER.unpack(raw[: HEADER.size])
    if magic != MAGIC:
        raise DamagedDataError(f"{path}: begins with {magic!r}, not {MAGIC!r}: not an MMIDIDX index")
    if version != VERSION:
        raise DamagedDataError(f"{path}: MMIDIDX version {version}; only version {VERSION} can be read")
    if code in _FLOAT_CODES:
        raise DamagedDataError(f"{path}: dtype code {code} is a float; token ids are integers")
    if code not in INTEGER_DTYPES:
        raise DamagedDataError(f"{path}: dtype code {code} is unknown; build it again")
    without_modes = HEADER.size + 12 * sequences + 8 * borders
    if borders > 0 and sequences > 0 and len(raw) == without_modes + sequences:
        raise DamagedDataError(f"{path}: holds multimodal modes, which are not text; only text can be read")
    if len(raw) != without_modes or borders == 0:
        raise DamagedDataError(
            f"{path}: {len(raw)} bytes, but {sequences} sequences and {borders - 1} documents take {without_modes}; "
            "truncated or changed, build it again"
        )
    return _Header(np.dtype(INTEGER_DTYPES[code]), sequences, borders)


class IndexedFile:
    """A .bin and .idx pair as one continuous stream of tokens with document borders. Read-only, memory-mapped.

    A document is what the index's document list says: one or more consecutive sequences.
    """

    def __init__(self, prefix: Path | str, *, vouched_digest: str | None = None):
        """Open and check; reads the whole index once (20 bytes a document), no token.

        Args:
            prefix: path without the ending.
            vouched_digest: digest of files that were verified and have not changed since: of the index, only the
                header, the sizes and the ends of its columns are read.

        Raises:
            MissingDataError: a file is not there.
            DamagedDataError: header, lengths, pointers or sizes do not agree.
        """
        self.prefix = Path(prefix)
        path = idx_path(prefix)
        self._raw_index = _map(path)
        header = _read_header(self._raw_index, path)
        self.dtype = header.dtype
        s, at = header.sequences, HEADER.size
        self._lengths = np.frombuffer(self._raw_index, "<i4", s, at)
        self._pointers = np.frombuffer(self._raw_index, "<i8", s, at + 4 * s)
        self._documents = np.frombuffer(self._raw_index, "<i8", header.borders, at + 12 * s)
        self._vouched_digest = vouched_digest
        if vouched_digest is None:
            total_bytes = self._check_pointers(path)
            self._check_documents(path)
        else:
            total_bytes = self._last_byte()
        self._raw_tokens = _map(bin_path(prefix))
        if len(self._raw_tokens) != total_bytes:
            raise DamagedDataError(
                f"{bin_path(prefix)}: {len(self._raw_tokens)} bytes, but its index counts {total_bytes}; "
                "truncated, or from another index: build it again"
            )
        self._tokens = np.frombuffer(self._raw_tokens, self.dtype)

    def _last_byte(self) -> int:
        """Where the last sequence ends, by the last entry alone."""
        if not len(self._lengths):
            return 0
        return int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize

    def _check_pointers(self, path: Path) -> int:
        """Size of the .bin that lengths and pointers agree on, in bytes."""
        total = 0
        for first in range(0, len(self._lengths), _BLOCK):
            lengths = self._lengths[first : first + _BLOCK].astype(np.int64)
            if lengths.min() < 0:
                bad = first + int(np.argmax(lengths < 0))
                raise DamagedDataError(f"{path}: sequence {bad} has a negative length; build it again")
            ends = total + np.cumsum(lengths) * self.dtype.itemsize
            wrong = self._pointers[first : first + _BLOCK] != ends - lengths * self.dtype.itemsize
            if wrong.any():
                bad = first + int(np.argmax(wrong))
                raise DamagedDataError(
                    f"{path}: sequence {bad} points at byte {self._pointers[bad]}, which is not where the lengths "
                    "before it end; damaged, build it again"
                )
            total = int(ends[-1])
        return total

    def _check_documents(self, path: Path) -> None:
        documents, sequences = self._documents, len(self._lengths)
        ends_right = documents[0] == 0 and documents[-1] == sequences
        rising = all(
            (np.diff(documents[first : first + _BLOCK + 1]) >= 0).all() for first in range(0, len(documents), _BLOCK)
        )
        if not (ends_right and rising):
            raise DamagedDataError(
                f"{path}: the document list does not rise from 0 to its {sequences} sequences; damaged, build it again"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream."""
        return len(self._tokens)

    @property
    def num_documents(self) -> int:
        """Documents in the stream, empty ones counted."""
        return len(self._documents) - 1

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream: a read-only view of the file, in its dtype.

        Raises:
            IndexError: the range is not within the stream.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"{self.prefix}: tokens [{start}, {stop}) of {self.num_tokens}")
        return self._tokens[start:stop]

    def document_bounds(self, first: int, stop: int) -> np.ndarray:
        """Where documents [first, stop) begin in the stream, and where the last one ends: [stop - first + 1], int64.

        Raises:
            IndexError: the range is not within the documents.
        """
        if not 0 <= first <= stop <= self.num_documents:
            raise IndexError(f"{self.prefix}: documents [{first}, {stop}) of {self.num_documents}")
        sequences = self._documents[first : stop + 1]
        bounds = np.full(len(sequences), self.num_tokens, np.int64)
        inside = sequences < len(self._pointers)
        bounds[inside] = self._pointers[sequences[inside]] // self.dtype.itemsize
        return bounds

    def document(self, number: int) -> np.ndarray:
        """Tokens of a document: a read-only view of the file, in its dtype."""
        start, stop = self.document_bounds(number, number + 1)
        return self.tokens(int(start), int(stop))

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions in [start, stop) at which a document begins, rising, int64; O(log documents) and what it returns.

        Empty documents begin where the next one does and are not seen.
        """
        # bisect, not np.searchsorted: the index is not aligned, and searchsorted would copy all of it at every call
        width = self.dtype.itemsize
        low, high = (bisect_left(self._pointers, position * width) for position in (start, stop))
        first, last = (bisect_left(self._documents, sequence) for sequence in (low, high))
        starts = self._pointers[self._documents[first:last]] // width
        return np.unique(starts)

    @cached_property
    def digest(self) -> str:
        """What these data are known by: 32 hex digits, independent of the path.

        xxh3-128 of the whole .idx, the size of the .bin and 64 evenly spaced pieces of it, 64 KiB each. It misses a
        change of tokens that keeps every document's length and falls between the pieces.
        """
        if self._vouched_digest is not None:
            return self._vouched_digest
        state = xxhash.xxh3_128(self._raw_index)
        size = len(self._raw_tokens)
        state.update(size.to_bytes(8, "little"))
        last = max(0, size - _SAMPLED_BYTES)
        for at in sorted({last * k // (_SAMPLES - 1) for k in range(_SAMPLES)}):
            state.update(self._raw_tokens[at : at + _SAMPLED_BYTES])
        return state.hexdigest()
