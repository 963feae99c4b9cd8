"""Command: one HTML page on a data set: what made it, how long, how compressed, how often repeated its documents are.

Walks the tokens once, in constant memory. The page asks nothing of the network and runs no script; whatever stands in a
document is text in it. Refuses a tokenizer that does not know the ids.
"""

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
import xxhash

from data_prep.inspect_index import (
    Bin,
    Lengths,
    check_ids,
    header_facts,
    manifest_facts,
    visible,
    warn_of_another_tokenizer,
)
from data_prep.tokenizer import Tokenizer, load_tokenizer
from megalemur.data.errors import DataError
from megalemur.data.indexed import IndexedFile, bin_path, idx_path
from megalemur.data.manifest import InputRecord, Manifest, manifest_path, read_manifest, write_atomically

_BLOCK = 1 << 20  # tokens counted together
_DOCUMENTS = 1 << 16  # documents digested together
_DIGESTS = 5_000_000  # distinct documents told apart at once: 160 MB, twice that while they are sorted
_INPUTS, _TOKENS, _BAD, _REPEATED = 50, 50, 100, 10  # rows of the tables
_SAMPLES, _SAMPLE_TOKENS = 6, 300
_LONGEST_CELL = 200  # characters

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Repeats:
    """Exact duplicates among documents, by digest.

    Where there are more than `limit` distinct documents, it keeps those whose digest is below a bound: a random sample
    in which either all copies of a document are, or none.
    """

    def __init__(self, limit: int = _DIGESTS):
        self._limit = limit
        self.halvings = 0
        """The sample is one in 2 ** halvings of the distinct documents."""
        # columns: digest, as two numbers; how often; first document
        self._table = np.zeros((0, 4), np.uint64)

    def add(self, digests: np.ndarray, first: int) -> None:
        """Digests of consecutive documents, [n, 2] uint64, of which the first has this number."""
        numbers = np.arange(first, first + len(digests), dtype=np.uint64)
        rows = np.column_stack([digests, np.ones(len(digests), np.uint64), numbers])
        rows = np.concatenate([self._table, rows[self._kept(rows)]])
        self._table = _merged(rows)
        while len(self._table) > self._limit:
            self.halvings += 1
            self._table = self._table[self._kept(self._table)]

    def _kept(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, 0] >> np.uint64(64 - self.halvings) == 0 if self.halvings else np.ones(len(rows), bool)

    @property
    def documents(self) -> int:
        """Documents in the sample, copies counted."""
        return int(self._table[:, 2].sum())

    @property
    def copies(self) -> int:
        """Documents in the sample that say what an earlier one says."""
        return self.documents - len(self._table)

    def most(self, number: int) -> list[tuple[int, int]]:
        """(times, number of the first one) of the documents that are there most often, twice at least."""
        repeated = self._table[self._table[:, 2] > 1]
        order = np.lexsort((repeated[:, 3], -repeated[:, 2].astype(np.int64)))
        return [(int(row[2]), int(row[3])) for row in repeated[order[:number]]]


def _merged(rows: np.ndarray) -> np.ndarray:
    """The same rows with those of one digest added up."""
    if not len(rows):
        return rows
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    starts = np.flatnonzero(np.concatenate([[True], (rows[1:, :2] != rows[:-1, :2]).any(axis=1)]))
    return np.column_stack(
        [rows[starts, :2], np.add.reduceat(rows[:, 2], starts), np.minimum.reduceat(rows[:, 3], starts)]
    )


def count_tokens(file: IndexedFile, vocab_size: int) -> np.ndarray:
    """How often each id is there: [vocab_size], int64.

    Raises:
        ValueError: an id is not below vocab_size.
    """
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, file.num_tokens, _BLOCK):
        stop = min(start + _BLOCK, file.num_tokens)
        block = file.tokens(start, stop)
        check_ids(block, vocab_size, f"{bin_path(file.prefix)}, tokens {start} to {stop - 1}")
        counts += np.bincount(block, minlength=vocab_size)
    return counts


def find_repeats(file: IndexedFile, limit: int = _DIGESTS) -> Repeats:
    """Exact duplicates among the documents of a file."""
    repeats = Repeats(limit)
    for first in range(0, file.num_documents, _DOCUMENTS):
        bounds = file.document_bounds(first, min(first + _DOCUMENTS, file.num_documents)).tolist()
        tokens = memoryview(file.tokens(bounds[0], bounds[-1])).cast("B") if bounds[-1] > bounds[0] else b""
        ends = [(bound - bounds[0]) * file.dtype.itemsize for bound in bounds]
        digests = b"".join(
            xxhash.xxh3_128_digest(tokens[start:stop]) for start, stop in zip(ends[:-1], ends[1:], strict=True)
        )
        repeats.add(np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64), first)
    return repeats


def bars(bins: Sequence[Bin]) -> str:
    """A bar chart of documents by length, as SVG."""
    if not bins:
        return "<p>There is no document.</p>"
    width, height, left, below = 760, 240, 10, 34
    step, most = (width - 2 * left) / len(bins), max(one.documents for one in bins)
    shapes = []
    for at, one in enumerate(bins):
        tall = (height - below - 24) * one.documents / most
        x, y = left + at * step, height - below - tall
        shapes.append(
            f"<g><title>{one.label} tokens: {one.documents:,} documents</title>"
            f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{step - 2:.1f}" height="{tall:.1f}"/>'
            f'<text x="{x + step / 2:.1f}" y="{y - 5:.1f}">{_short(one.documents)}</text>'
            f'<text class="axis" x="{x + step / 2:.1f}" y="{height - below + 15}">{_short(one.shortest)}</text></g>'
        )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Documents by length">{"".join(shapes)}'
        f'<path d="M{left} {height - below}H{width - left}"/>'
        f'<text class="axis" x="{width / 2}" y="{height - 3}">tokens in a document, at least</text></svg>'
    )


def _short(number: int) -> str:
    """1,234,567 as 1.2M."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            divisor = 1000 if letter == "k" else size
            return f"{number / divisor:.1f}".removesuffix(".0") + letter
    return f"{number}"


def _text(value: object) -> str:
    """What may stand in the page: escaped, not endless, and unable to turn what is around it."""
    text = visible(str(value))
    return escape(text if len(text) <= _LONGEST_CELL else f"{text[:_LONGEST_CELL]}…")


def _bar(share: float) -> str:
    return f'<svg class="share" viewBox="0 0 100 10" aria-hidden="true"><rect width="{100 * share:.1f}" height="10"/></svg>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """An HTML table.

    Args:
        heads: of the columns, plain text.
        rows: cells, as HTML.
        numeric: columns whose cells are set to the right.
    """
    kinds = [' class="n"' if at in numeric else "" for at in range(len(heads))]
    head = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for name, kind in zip(heads, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>\n" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, plain text, as an HTML table."""
    body = "".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>\n' for name, value in rows)
    return f'<div class="wide"><table class="facts"><tbody>\n{body}</tbody></table></div>'
