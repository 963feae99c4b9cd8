"""One unit: texts to tokens, appended to this worker's shard, with everything a manifest has to know of it."""

import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import xxhash

from data_prep.documents import Batch
from data_prep.engine import Engine, first_difference
from data_prep.errors import EngineError, PrepError
from data_prep.inputs import Source
from data_prep.tokenizer import Tokenizer
from megalemur.data.indexed import optimal_dtype

_SPOT_CHECK_EVERY = 1021  # documents; the reference is up to fourteen times as slow, so this costs some two per cent
ALIGNMENT = 8


class Settings(NamedTuple):
    """What becomes of every document."""

    tokenizer: Path
    engine: str
    """fast or reference."""
    text_key: str
    prepend_bos: bool
    append_eos: bool


@dataclass
class Tally:
    """One source's part of a unit."""

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    text_bytes: int = 0
    lines: int = 0


@dataclass
class Extent:
    """Where a unit's tokens lie, and what they are. One line of the journal."""

    unit: int
    chunk: int
    """Number within a stream; 0 for everything else."""
    shard: str
    start: int
    """First byte of the tokens; the lengths, int32, follow at the next multiple of ALIGNMENT."""
    tokens: int
    documents: int
    digest: str
    """xxh3-128 of tokens and lengths."""
    unknown: int = 0
    control: dict[str, int] = field(default_factory=dict)
    tallies: dict[int, Tally] = field(default_factory=dict)
    """By number of the source."""
    bad: list[tuple[int, int | None, str]] = field(default_factory=list)
    """(source, line from the unit's beginning, reason)."""
    last: bool = True
    """No chunk follows."""
    source_digest: str = ""
    """xxh3-128 of a chunk's text, which cannot be looked up again."""

    def lengths_start(self, itemsize: int) -> int:
        """First byte of the lengths."""
        return aligned(self.start + self.tokens * itemsize)


def aligned(position: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-position // ALIGNMENT) * ALIGNMENT


class Encoder:
    """Turns batches into tokens in the file's dtype."""

    def __init__(self, settings: Settings, engine: Engine, reference: Tokenizer):
        self.engine, self._reference = engine, reference
        record = reference.record
        self.dtype = optimal_dtype(record.vocab_size)
        self._vocab_size, self._unk = record.vocab_size, record.unk_id
        self._bos = record.bos_id if settings.prepend_bos else None
        self._eos = record.eos_id if settings.append_eos else None
        self._checks = engine is not reference
        self._until_check = 0  # documents, over all units of this worker: its very first is compared
        self._forbidden = np.zeros(record.vocab_size, bool)
        self._forbidden[[token for token in reference.control.values() if token != self._unk]] = True
        self._highest_control = max(reference.control.values(), default=-1)
        names = sorted(reference.control, key=len, reverse=True)
        # six times as fast as str.count for each name: it looks for their common beginning
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def count_control(self, texts: list[str]) -> Counter[str]:
        """Names of control tokens in the texts."""
        return Counter(name for text in texts for name in self._control.findall(text))

    def encode(self, batch: Batch, seen: int, where: str) -> tuple[np.ndarray, np.ndarray, int]:
        """(tokens in the file's dtype, length of each document that is not empty, unknown tokens).

        Args:
            batch: some documents.
            seen: documents of this unit before it, for what is said of one that the engines encode differently.
            where: the source's name.

        Raises:
            EngineError: the fast engine's ids are not the reference's.
            PrepError: an id is outside the vocabulary, or a control token.
        """
        encoded = self.engine.encode(batch.texts)
        if self._checks:
            self._spot_check(batch, seen, where)
        ids, lengths = encoded.ids, encoded.lengths[encoded.lengths > 0]
        unknown = 0
        # control tokens usually are the lowest ids: most batches show by their smallest id that they have none
        if ids.size and (int(ids.max()) >= self._vocab_size or int(ids.min()) <= self._highest_control):
            self._refuse_control(ids, where)
            unknown = int(np.count_nonzero(ids == self._unk)) if self._unk is not None else 0
        return self._framed(ids, lengths), (lengths + self._extra).astype(np.int32), unknown

    def _refuse_control(self, ids: np.ndarray, where: str) -> None:
        highest = int(ids.max())
        if highest >= self._vocab_size or self._forbidden[ids].any():
            raise PrepError(
                f"{where}: {self.engine.name} gave id {highest} of {self._vocab_size}, or a control token for "
                "text; use --engine reference, or another tokenizer"
            )

    @property
    def _extra(self) -> int:
        return (self._bos is not None) + (self._eos is not None)

    def _framed(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Ids with BOS and EOS around each document, in the file's dtype."""
        if not self._extra:
            return ids.astype(self.dtype)
        framed = np.empty(len(ids) + self._extra * len(lengths), self.dtype)
        text = np.ones(len(framed), bool)
        ends = np.cumsum(lengths + self._extra)
        if self._eos is not None:
            framed[ends - 1] = self._eos
            text[ends - 1] = False
        if self._bos is not None:
            starts = ends - lengths - self._extra
            framed[starts] = self._bos
            text[starts] = False
        framed[text] = ids
        return framed

    def _spot_check(self, batch: Batch, seen: int, where: str) -> None:
        first = self._until_check
        self._until_check = (first - len(batch.texts)) % _SPOT_CHECK_EVERY
        texts = batch.texts[first::_SPOT_CHECK_EVERY]
        different = first_difference(self.engine, self._reference, texts) if texts else None
        if different is not None:
            line = batch.lines[first + different * _SPOT_CHECK_EVERY]
            raise EngineError(
                f"{where}, document {seen + first + different * _SPOT_CHECK_EVERY} of this unit"
                f"{f' (its line {line})' if line else ''}: {self.engine.name} gives other ids than "
                f"the reference for {texts[different][:60]!r}; start again with --engine reference --restart"
            )


class Shard:
    """The file to which one worker appends units."""

    def __init__(self, path: Path):
        self.name = path.name
        self._stream: IO[bytes] = path.open("xb", buffering=1 << 20)

    def write(self, batches: Iterable[Batch], encoder: Encoder, sources: list[Source]) -> Extent:
        """Encode and append a unit. What is on the disk counts only once the extent stands in the journal.

        Raises:
            PrepError: as Encoder.encode.
            OSError: the disk is full.
        """
        start = aligned(self._stream.tell())
        self._stream.seek(start)
        extent = Extent(0, 0, self.name, start, 0, 0, "")
        digest, lengths, control = xxhash.xxh3_128(), array("i"), Counter[str]()
        seen = 0
        for batch in batches:
            tally = extent.tallies.setdefault(batch.source, Tally())
            tally.lines += batch.lines_read
            extent.bad += [(batch.source, bad.line, bad.reason) for bad in batch.bad]
            if not batch.texts:
                continue
            tokens, counts, unknown = encoder.encode(batch, seen, sources[batch.source].name)
            seen += len(batch.texts)
            self._stream.write(tokens.data)
            digest.update(tokens.data)
            lengths.frombytes(counts.tobytes())
            control += encoder.count_control(batch.texts)
            extent.unknown += unknown
            _count(tally, batch.texts, tokens, counts)
        extent.tokens = sum(tally.tokens for tally in extent.tallies.values())
        extent.documents = len(lengths)
        extent.control = dict(control)
        self._stream.seek(extent.lengths_start(encoder.dtype.itemsize))
        self._stream.write(lengths)
        digest.update(lengths)
        self._stream.flush()
        extent.digest = digest.hexdigest()
        return extent


def _count(tally: Tally, texts: list[str], tokens: np.ndarray, counts: np.ndarray) -> None:
    tally.documents += len(counts)
    tally.empty += len(texts) - len(counts)
    tally.tokens += len(tokens)
    tally.text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)


def extent_from_json(values: dict[str, Any]) -> Extent:
    """A journal's line."""
    values["tallies"] = {int(number): Tally(**tally) for number, tally in values["tallies"].items()}
    values["bad"] = [tuple(bad) for bad in values["bad"]]
    return Extent(**values)
