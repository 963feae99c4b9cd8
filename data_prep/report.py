"""Command: one HTML page on a data set: what made it, how long, how compressed, how often repeated its documents are.

Walks the tokens once, in constant memory. The page asks nothing of the network and runs no script; whatever stands in a
document is text in it. Refuses a tokenizer that does not know the ids.
"""

import itertools
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
import xxhash

from data_prep.exits import errors_said
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
from megalemur.data.indexed import IndexedFile, bin_path
from megalemur.data.manifest import InputRecord, Manifest, read_manifest, write_atomically

_BLOCK = 1 << 20  # tokens counted together
_DOCUMENTS = 1 << 16  # documents digested together
_DIGESTS = 5_000_000  # distinct documents told apart at once: 0.8 GB while they are sorted
_PENDING = 1_000_000  # documents sorted in at once
_INPUTS, _TOKENS, _BAD, _REPEATED = 50, 50, 100, 10  # rows of the tables
_SAMPLES, _SAMPLE_TOKENS = 6, 300
_LONGEST_CELL = 200  # characters
_LONGEST_TEXT = 4000

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2128; --quiet: #59636e; --line: #d1d9e0; --bar: #3b76c4;
  --t1: #cfe3ff; --t2: #ffe9b3; --t3: #cdf0d2; --t4: #f6d3e6; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e8ec; --quiet: #9aa4af; --line: #363d46;
  --bar: #6ea8f5; --t1: #1d3d66; --t2: #594413; --t3: #1d4a2b; --t4: #5c2547; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 1rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
.warning { border-left: 4px solid #d1242f; padding-left: .8rem; overflow-wrap: anywhere; }
.pair { display: grid; gap: 0 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); }
.halves { display: grid; gap: 0 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)); }
.halves h3 { margin-top: .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; unicode-bidi: isolate; }
th { font-weight: 600; color: var(--quiet); white-space: nowrap; overflow-wrap: normal; }
.n { text-align: right; white-space: nowrap; overflow-wrap: normal; }
.facts th { width: 1%; padding-right: 1.5rem; }
code, pre, .tokens { font: .86rem/1.6 ui-monospace, "DejaVu Sans Mono", monospace; }
code { white-space: pre-wrap; overflow-wrap: anywhere; }
pre, .tokens { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 6px;
  padding: .6rem .8rem; margin: .3rem 0; unicode-bidi: isolate; }
.tokens span { border-radius: 2px; background: var(--t1); }
.tokens span:nth-child(4n+2) { background: var(--t2); }
.tokens span:nth-child(4n+3) { background: var(--t3); }
.tokens span:nth-child(4n) { background: var(--t4); }
.chart { display: block; width: 100%; max-width: 900px; margin-top: 1rem; }
.chart rect, .share rect { fill: var(--bar); }
.chart path { stroke: var(--line); }
.chart text { fill: var(--ink); text-anchor: middle; }
.chart .axis { fill: var(--quiet); }
.share { width: 6rem; height: .6rem; }
summary { cursor: pointer; color: var(--quiet); }
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Repeats:
    """Exact duplicates among documents, by digest.

    Where there are more than `limit` distinct documents, it keeps those whose digest is below a bound: a random sample
    in which either all copies of a document are, or none.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self.halvings = 0
        """The sample is one in 2 ** halvings of the distinct documents."""
        # columns: digest, as two numbers; how often; first document
        self._table = np.zeros((0, 4), np.uint64)
        self._pending: list[np.ndarray] = []

    def add(self, digests: np.ndarray, first: int) -> None:
        """Digests of consecutive documents, [n, 2] uint64, of which the first has this number."""
        numbers = np.arange(first, first + len(digests), dtype=np.uint64)
        rows = np.column_stack([digests, np.ones(len(digests), np.uint64), numbers])
        self._pending.append(rows[self._kept(rows)])
        if sum(map(len, self._pending)) >= min(_PENDING, self._limit):
            self._settle()

    def _settle(self) -> None:
        self._table = _merged(np.concatenate([self._table, *self._pending]))
        self._pending = []
        while len(self._table) > self._limit:
            self.halvings += 1
            self._table = self._table[self._kept(self._table)]

    def _kept(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, 0] >> np.uint64(64 - self.halvings) == 0 if self.halvings else np.ones(len(rows), bool)

    @property
    def documents(self) -> int:
        """Documents in the sample, copies counted."""
        self._settle()
        return int(self._table[:, 2].sum())

    @property
    def copies(self) -> int:
        """Documents in the sample that say what an earlier one says."""
        return self.documents - len(self._table)

    def most(self, number: int) -> list[tuple[int, int]]:
        """(times, number of the first one) of the documents that are there most often, twice at least."""
        self._settle()
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


def find_repeats(file: IndexedFile) -> Repeats:
    """Exact duplicates among the documents of a file."""
    repeats = Repeats(_DIGESTS)
    for first in range(0, file.num_documents, _DOCUMENTS):
        bounds = file.document_bounds(first, min(first + _DOCUMENTS, file.num_documents)).tolist()
        tokens = file.tokens(bounds[0], bounds[-1]).view(np.uint8).data
        ends = [(bound - bounds[0]) * file.dtype.itemsize for bound in bounds]
        digests = b"".join(xxhash.xxh3_128_digest(tokens[start:stop]) for start, stop in itertools.pairwise(ends))
        repeats.add(np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64), first)
    return repeats


def bars(bins: Sequence[Bin]) -> str:
    """A bar chart of documents by length, as SVG."""
    if not bins:
        return "<p>There is no document.</p>"
    width, floor = 760, 206
    step, most = min(60.0, width / len(bins)), max(one.documents for one in bins)
    shapes = []
    for at, one in enumerate(bins):
        x, middle, tall = at * step, (at + 0.5) * step, 182 * one.documents / most
        shapes.append(
            f"<g><title>{one.label} tokens: {one.documents:,} documents</title>"
            f'<rect x="{x + 1:.1f}" y="{floor - tall:.1f}" width="{step - 2:.1f}" height="{tall:.1f}"/>'
            f'<text x="{middle:.1f}" y="{floor - tall - 5:.1f}">{_short(one.documents, 1000)}</text>'
            f'<text class="axis" x="{middle:.1f}" y="{floor + 15}">{_short(one.shortest, 1024)}</text></g>'
        )
    size = min(13.0, step / 2.8)  # room for four characters a bar
    return (
        f'<svg class="chart" viewBox="0 0 {width} 240" font-size="{size:.1f}" role="img" '
        f'aria-label="Documents by length">{"".join(shapes)}<path d="M0 {floor}H{width}"/>'
        f'<text class="axis" x="{width / 2}" y="{floor + 31}">tokens in a document, at least (K: 1,024)</text></svg>'
    )


def _short(number: int, thousand: int) -> str:
    """A number in four characters: 9876, 12k, 3.4M; K, with 1,024 for a thousand, are powers of two."""
    if number < (10_000 if thousand == 1000 else 1024):
        return f"{number}"
    power = 1 if number < thousand**2 else 2 if number < thousand**3 else 3
    size = number / thousand**power
    text = f"{size:.0f}" if size >= 9.95 else f"{size:.1f}".removesuffix(".0")
    return text + ("KMG" if thousand == 1024 else "kMG")[power - 1]


def _text(value: object) -> str:
    """What may stand in the page: escaped, not endless, and unable to turn what is around it."""
    text = visible(str(value))
    return escape(text if len(text) <= _LONGEST_CELL else f"{text[:_LONGEST_CELL]}…")


def _bar(share: float) -> str:
    bar = f'<rect width="{100 * share:.1f}" height="10"/>'
    return f'<svg class="share" viewBox="0 0 100 10" aria-hidden="true">{bar}</svg>'


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


def _summary(file: IndexedFile, manifest: str) -> str:
    header = f"<div>\n<h3>Files</h3>\n{facts(header_facts(file))}\n</div>"
    return f'<div class="halves">\n{header}\n<div>\n<h3>Manifest</h3>\n{manifest}\n</div>\n</div>'


def _lengths(file: IndexedFile) -> str:
    lengths = Lengths(file)
    percentiles = f"<div>\n<h3>Tokens a document</h3>\n{facts(lengths.percentiles())}\n</div>"
    return f'<div class="halves">\n<div>{bars(lengths.bins())}</div>\n{percentiles}\n</div>'


def _inputs(inputs: Sequence[InputRecord]) -> str:
    """Bytes a token, input by input, those with the most tokens first."""
    ordered = sorted(inputs, key=lambda one: -one.tokens)
    lines = [(one.name, one.documents, one.tokens, one.text_bytes) for one in ordered[:_INPUTS]]
    if rest := ordered[_INPUTS:]:
        documents, tokens = sum(one.documents for one in rest), sum(one.tokens for one in rest)
        lines.append((f"{len(rest):,} others together", documents, tokens, sum(one.text_bytes for one in rest)))
    most = max((size / tokens for *_, tokens, size in lines if tokens), default=0.0)
    rows = []
    for name, documents, tokens, size in lines:
        rate = size / tokens if tokens else 0.0
        shown = (f"{rate:.2f}", _bar(rate / most)) if rate else ("not known", "")
        rows.append((_text(name), f"{documents:,}", f"{tokens:,}", *shown))
    return table(("input", "documents", "tokens", "bytes a token", ""), rows, numeric=(1, 2, 3))


def _tokens(counts: np.ndarray, tokenizer: Tokenizer) -> str:
    """What the vocabulary is used for, and its most frequent tokens."""
    total = max(1, int(counts.sum()))
    fallen = int(counts[tokenizer.byte_ids].sum())
    spelled = f"{fallen:,} of {int(counts.sum()):,} tokens, {fallen / total:.2%}"
    used = [
        ("ids in use", f"{np.count_nonzero(counts):,} of {len(counts):,}"),
        ("byte fallback", spelled if len(tokenizer.byte_ids) else "the tokenizer never falls back to bytes"),
        *((f"{name} (id {token})", f"{int(counts[token]):,}") for name, token in tokenizer.control.items()),
    ]
    order = [int(token) for token in np.argsort(-counts, kind="stable")[:_TOKENS] if counts[token]]
    rows = []
    for token in order:
        times = int(counts[token])
        rows.append((f"<code>{_text(tokenizer.piece(token))}</code>", f"{token}", f"{times:,}", f"{times / total:.2%}"))
    heads, half = ("piece", "id", "tokens", "share"), -(-len(rows) // 2)
    tables = "\n".join(table(heads, some, numeric=(1, 2, 3)) for some in (rows[:half], rows[half:]) if some)
    return f'{facts(used[:20])}\n<h3>Most frequent</h3>\n<div class="pair">{tables}</div>'


def _repeats(file: IndexedFile, tokenizer: Tokenizer) -> str:
    repeats = find_repeats(file)
    documents, copies = repeats.documents, repeats.copies
    said = f"<p>{copies:,} of {documents:,} documents ({copies / max(1, documents):.2%}) repeat an earlier one, "
    said += "token for token.</p>"
    if repeats.halvings:
        said += (
            f"<p>Counted in a random sample, one in {2**repeats.halvings:,} of the distinct documents: all copies of a "
            "document are in it, or none.</p>"
        )
    rows = []
    for times, number in repeats.most(_REPEATED):
        document = file.document(number)
        text = tokenizer.decode(document[:60].tolist())
        rows.append((f"{times:,}", f"{number}", f"{len(document):,}", f"<code>{_text(text)}</code>"))
    heads = ("times", "first document", "tokens", "begins")
    return said + (table(heads, rows, numeric=(0, 1, 2)) if rows else "")


def _bad(manifest: Manifest) -> str:
    if not manifest.bad:
        return "<p>None is listed.</p>"
    rows = [(_text(one.where), _text(one.reason)) for one in manifest.bad[:_BAD]]
    every = max(len(manifest.bad), sum(one.bad for one in manifest.inputs))
    said = f"<p>{every:,} were left out; here are the first {len(rows)}.</p>" if every > len(rows) else ""
    return said + table(("where", "what is wrong"), rows)


def _sample(file: IndexedFile, number: int, tokenizer: Tokenizer) -> str:
    """The beginning of a document: its tokens, each with its id and piece when pointed at, and its text."""
    document = file.document(number)
    ids = document[:_SAMPLE_TOKENS].tolist()
    spans = []
    for token in ids:
        piece = _text(tokenizer.piece(token))
        # a line of text is a line here too
        shown = piece + ("\n" if "\n" in tokenizer.decode([token]) and not piece.endswith("\n") else "")
        spans.append(f'<span title="id {token}: {piece}">{shown}</span>')
    text = visible(tokenizer.decode(ids))
    text = escape(text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…")
    part = "" if len(ids) == len(document) else f", the first {len(ids)}"
    return (
        f'<h3>Document {number}: {len(document):,} tokens{part}</h3>\n<div class="tokens">{"".join(spans)}</div>\n'
        f"<details><summary>Text</summary><pre>{text}</pre></details>"
    )


def _samples(file: IndexedFile, tokenizer: Tokenizer) -> str:
    last = file.num_documents - 1
    numbers = sorted({last * k // (_SAMPLES - 1) for k in range(_SAMPLES)}) if last >= 0 else []
    return "\n".join(_sample(file, number, tokenizer) for number in numbers) or "<p>There is no document.</p>"


def page(file: IndexedFile, manifest: Manifest | None, tokenizer: Tokenizer) -> str:
    """The report as HTML.

    Raises:
        ValueError: the tokenizer does not know an id of the data set.
    """
    counts = count_tokens(file, tokenizer.record.vocab_size)
    made = "<p>There is no manifest: nothing is known of what made the data set.</p>"
    sections = {
        "Summary": _summary(file, facts(manifest_facts(manifest, file.prefix)) if manifest else made),
        "Documents by length": _lengths(file),
        "Bytes a token": _inputs(manifest.inputs) if manifest and manifest.inputs else "<p>No input is known.</p>",
        "Tokens": _tokens(counts, tokenizer),
        "Exact duplicates": _repeats(file, tokenizer),
        "Sample documents": _samples(file, tokenizer),
        "Bad documents": _bad(manifest) if manifest else made,
    }
    warning = warn_of_another_tokenizer(tokenizer, manifest)
    body = f'<p class="warning">{escape(warning)}</p>\n' if warning else ""
    for title, content in sections.items():
        body += f'<section id="{title.lower().replace(" ", "-")}">\n<h2>{title}</h2>\n{content}\n</section>\n'
    return _framed(_text(file.prefix.name), body)


def _framed(name: str, body: str) -> str:
    # nothing in a document runs or loads, should it ever get past the escaping
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: data set report</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{name}</h1>\n{body}</main>\n</body>\n</html>\n"
    )


def write_report(prefix: Path, path: Path, tokenizer: Tokenizer) -> None:
    """Write the report of a data set, in place of one that is there.

    Args:
        prefix: of the files, without the ending.
        path: the page to write; its directory is made.
        tokenizer: what made the data set.

    Raises:
        DataError: the data set is missing or damaged.
        ValueError: the tokenizer does not know an id of it.
        OSError: the page cannot be written.
    """
    text = page(IndexedFile(prefix), read_manifest(prefix), tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [text.encode()])


@app.command()
def command(
    prefix: Annotated[Path, typer.Argument(help="Prefix of the files, without .bin or .idx.", show_default=False)],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer that made the data set.")],
    output: Annotated[Path, typer.Option(help="Page to write, .html; replaced if it is there.")],
) -> None:
    """Write one HTML page on a data set."""
    with errors_said():
        if output.suffix != ".html" or output.is_dir():
            raise ValueError(f"--output {output}: not a page; give a file that ends in .html")
        write_report(prefix, output, load_tokenizer(tokenizer))
    typer.echo(f"{output}: {output.stat().st_size:,} bytes")


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
