"""Command: what a data set holds: header, manifest and document lengths, or single documents as tokens.

Reads in constant memory and changes nothing. Refuses documents that are not there, and a tokenizer that does not know
the ids.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.exits import errors_said
from data_prep.tokenizer import Tokenizer, load_tokenizer
from megalemur.data.indexed import HEADER, IndexedFile, bin_path, idx_path
from megalemur.data.manifest import Manifest, read_manifest

_BLOCK = 1 << 20  # documents looked at together
_COUNTED = 1 << 20  # lengths below are counted one by one; longer documents are too few to fill a memory
_WINDOW = 1 << 16  # tokens decoded together where text is searched
_BAR = 40
_STYLES = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Bin(NamedTuple):
    """Documents of about the same length."""

    shortest: int
    """Tokens, included."""
    longest: int
    """Tokens, included."""
    documents: int

    @property
    def label(self) -> str:
        """The range of lengths."""
        alone = self.shortest == self.longest
        return f"{self.shortest:,}" if alone else f"{self.shortest:,} to {self.longest:,}"


class Lengths:
    """Lengths of all documents of a file, in tokens: exact, and in constant memory."""

    def __init__(self, file: IndexedFile):
        self.documents, self.tokens = file.num_documents, file.num_tokens
        counts = np.zeros(_COUNTED, np.int64)
        longer = [np.zeros(0, np.int64)]
        for first in range(0, self.documents, _BLOCK):
            lengths = np.diff(file.document_bounds(first, min(first + _BLOCK, self.documents)))
            counts += np.bincount(lengths[lengths < _COUNTED], minlength=_COUNTED)
            longer.append(lengths[lengths >= _COUNTED])
        self._rising = np.cumsum(counts)
        self._longer = np.sort(np.concatenate(longer))

    def quantile(self, fraction: float) -> int:
        """The shortest length that this fraction of the documents does not exceed; 0 where there is no document."""
        rank = min(max(1, int(np.ceil(fraction * self.documents))), self.documents)
        counted = int(self._rising[-1])
        return int(np.searchsorted(self._rising, rank) if rank <= counted else self._longer[rank - counted - 1])

    def bins(self) -> list[Bin]:
        """Documents by powers of two, from the shortest to the longest; empty where there is no document."""
        if not self.documents:
            return []
        bins = []
        for power in range(self.quantile(0).bit_length(), self.quantile(1).bit_length() + 1):
            low, high = (1 << power) >> 1, max(0, (1 << power) - 1)
            bins.append(Bin(low, high, self._up_to(high) - (self._up_to(low - 1) if low else 0)))
        return bins

    def _up_to(self, length: int) -> int:
        """Documents that are not longer."""
        if length < _COUNTED:
            return int(self._rising[length])
        return int(self._rising[-1] + np.searchsorted(self._longer, length, side="right"))

    def percentiles(self) -> list[tuple[str, str]]:
        """Name and value: the mean, and lengths from the shortest to the longest."""
        named = {"shortest": 0.0, "1 %": 0.01, "5 %": 0.05, "25 %": 0.25, "median": 0.5}
        named |= {"75 %": 0.75, "95 %": 0.95, "99 %": 0.99, "longest": 1.0}
        mean = self.tokens / max(1, self.documents)
        return [("mean", f"{mean:,.1f}"), *((name, f"{self.quantile(at):,}") for name, at in named.items())]


def visible(text: str) -> str:
    """The text with control characters written as escapes: they would steer the terminal, or turn the text around."""
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def header_facts(file: IndexedFile) -> list[tuple[str, str]]:
    """What the files themselves say, name and value."""
    with idx_path(file.prefix).open("rb") as stream:
        sequences = HEADER.unpack(stream.read(HEADER.size))[3]
    sizes = [path(file.prefix).stat().st_size for path in (bin_path, idx_path)]
    return [
        ("dtype", file.dtype.name),
        ("sequences", f"{sequences:,}"),
        ("documents", f"{file.num_documents:,}"),
        ("tokens", f"{file.num_tokens:,}"),
        ("bytes", f"{sizes[0]:,} in .bin, {sizes[1]:,} in .idx"),
    ]


def manifest_facts(manifest: Manifest, prefix: Path) -> list[tuple[str, str]]:
    """What the manifest says, name and value."""
    tokenizer, origin = manifest.tokenizer, manifest.origin
    written = sum(one.tokens for one in manifest.inputs)
    known = written > 0 and manifest.text_bytes > 0
    control = sorted(manifest.control_strings.items(), key=lambda one: -one[1])
    facts = [
        ("made by", f"{origin.tool} {origin.version}, {origin.finished}"),
        ("tokenizer", f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids, sha256 {tokenizer.sha256}"),
        ("BOS", _policy("begins", tokenizer.bos_id, manifest.prepend_bos)),
        ("EOS", _policy("ends", tokenizer.eos_id, manifest.append_eos)),
        ("unknown tokens", f"{manifest.unknown_tokens:,}"),
        ("bytes a token", f"{manifest.text_bytes / written:.2f}" if known else "not known"),
        ("inputs", f"{len(manifest.inputs):,}, with {manifest.empty_documents:,} empty documents left out"),
        ("bad documents", f"{sum(one.bad for one in manifest.inputs):,} left out"),
        ("control strings", ", ".join(f"{name} {times:,}" for name, times in control[:20]) or "none in the text"),
        ("digest", manifest.digest),
        ("vouches", "yes" if manifest.vouches(prefix) else "no: a file changed its time after it was last verified"),
    ]
    if manifest.part is not None:
        facts.insert(1, ("part", f"{manifest.part[0]}, of 0 to {manifest.part[1] - 1}"))
    return facts


def _policy(verb: str, token: int | None, used: bool) -> str:
    if token is None:
        return "the tokenizer has none"
    return f"{verb} every document, id {token}" if used else f"not added (id {token})"


def document_numbers(text: str, documents: int) -> list[range]:
    """Numbers that a list such as 3,10-12 names, ends included.

    Raises:
        ValueError: not such a list, or a document that is not there.
    """
    numbers = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not found:
            raise ValueError(f"--documents {text}: {part!r} is not a number; write numbers and ranges, as 3,10-12")
        first, last = int(found[1]), int(found[2] or found[1])
        if first > last:
            raise ValueError(f"--documents {text}: {part!r} runs backwards; write {last}-{first}")
        if last >= documents:
            there = f"there are {documents}, from 0 to {documents - 1}" if documents else "there is none"
            raise ValueError(f"--documents {text}: no document {last}; {there}")
        numbers.append(range(first, last + 1))
    return numbers


def check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """Refuse ids that a tokenizer cannot know.

    Raises:
        ValueError: one is negative or not below vocab_size.
    """
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise ValueError(
            f"{where}: holds id {wrong}, but --tokenizer knows 0 to {vocab_size - 1}; "
            "give the tokenizer that made the data set"
        )


def find(ids: np.ndarray, text: str, tokenizer: Tokenizer) -> int | None:
    """The token that completes the first occurrence of a text in a document, or None where it is not there.

    Decodes a window at a time, so that a long document takes no more memory than a short one.
    """
    overlap = len(text.encode()) + 16  # a token is a byte at least
    step = max(_WINDOW, 2 * overlap) - overlap
    for first in range(0, max(1, len(ids) - overlap), step):
        window = ids[first : first + step + overlap].tolist()
        if text in tokenizer.decode(window):
            low, high = 0, len(window)  # the text is in the first `high` tokens, and not in the first `low`
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if text in tokenizer.decode(window[:middle]) else (middle, high)
            return first + high - 1
    return None


class Viewer(NamedTuple):
    """Prints documents."""

    console: Console
    file: IndexedFile
    tokenizer: Tokenizer | None
    max_tokens: int
    """Tokens shown of a document."""
    ids: bool
    """Whether every token has its id beside it."""

    def show(self, number: int, around: int = 0) -> None:
        """Print one document, or the tokens around one of its tokens where it is longer than what is shown."""
        document = self.file.document(number)
        first = max(0, min(around - self.max_tokens // 2, len(document) - self.max_tokens))
        shown = document[first : first + self.max_tokens].tolist()
        part = "" if len(shown) == len(document) else f", shown are {first:,} to {first + len(shown) - 1:,}"
        self._print(Text(f"document {number}: {len(document):,} tokens{part}", style="bold"))
        if self.tokenizer is None:
            self._print(Text(" ".join(map(str, shown))))
        else:
            check_ids(np.array(shown, np.int64), self.tokenizer.record.vocab_size, f"document {number}")
            self._print(self._tokens(shown, self.tokenizer))
            self._print(Text("text:", style="bold"))
            self._print(Text(visible(self.tokenizer.decode(shown))))
        self._print(Text())

    def _tokens(self, ids: Sequence[int], tokenizer: Tokenizer) -> Text:
        coloured = self.console.is_terminal and not self.console.no_color
        text = Text()
        for at, token in enumerate(ids):
            piece = visible(tokenizer.piece(token)).replace("\n", "\\n").replace("\t", "\\t")
            text.append("" if coloured or at == 0 else "|")
            text.append(piece, _STYLES[at % len(_STYLES)] if coloured else None)
            text.append(f":{token}" if self.ids else "", "dim")
            # a line of text is a line here too, if a terminal shows it
            text.append("\n" if coloured and "\n" in tokenizer.decode([token]) else "")
        return text

    def _print(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


def show_summary(console: Console, file: IndexedFile, manifest: Manifest | None) -> None:
    """Print header, manifest and lengths of the documents."""
    console.print(_table(f"{file.prefix}", header_facts(file)))
    if manifest is None:
        console.print(Text("no manifest: nothing is known of the tokenizer and the inputs"))
    else:
        console.print(_table("Manifest", manifest_facts(manifest, file.prefix)))
    lengths = Lengths(file)
    histogram = Table(title="Documents by length", title_justify="left")
    for name in ("tokens", "documents"):
        histogram.add_column(name, justify="right", no_wrap=True)
    histogram.add_column("", no_wrap=True, min_width=_BAR)
    bins = lengths.bins()
    most = max((one.documents for one in bins), default=1)
    for one in bins:
        histogram.add_row(one.label, f"{one.documents:,}", "█" * -(-one.documents * _BAR // most))
    console.print(histogram)
    console.print(_table("Tokens a document", lengths.percentiles()))


def _table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=Text(visible(title)), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(visible(value)))
    return table


def _search(viewer: Viewer, numbers: Iterable[int], *, text: str, limit: int) -> None:
    """Print the first documents that contain the text."""
    tokenizer = viewer.tokenizer
    if tokenizer is None:
        raise ValueError("--search: text is found by decoding; add --tokenizer with the file that made the data set")
    if not text:
        raise ValueError("--search: an empty text is in every document; give one, or use --documents")

    def matches() -> Iterator[tuple[int, int]]:
        for number in numbers:
            ids = viewer.file.document(number)
            check_ids(ids, tokenizer.record.vocab_size, f"document {number}")
            if (at := find(ids, text, tokenizer)) is not None:
                yield number, at

    found = 0
    for number, at in itertools.islice(matches(), limit):
        viewer.show(number, at)
        found += 1
    end = f", there may be more: raise --limit {limit}" if found == limit else ""
    viewer.console.print(
        Text(f"{found} {'document' if found == 1 else 'documents'} with {visible(text)!r}{end}"), soft_wrap=True
    )


def warn_of_another_tokenizer(tokenizer: Tokenizer, manifest: Manifest | None) -> str | None:
    """What to say where the tokenizer's file is not the one that made the data set; None where all is well."""
    if manifest is None or manifest.tokenizer.sha256 == tokenizer.record.sha256:
        return None
    return (
        f"warning: --tokenizer has sha256 {tokenizer.record.sha256}, but the data set was made with "
        f"{manifest.tokenizer.sha256}; pieces and text may be wrong"
    )


@app.command()
def command(
    prefix: Annotated[Path, typer.Argument(help="Prefix of the files, without .bin or .idx.", show_default=False)],
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer that made the data set.")] = None,
    documents: Annotated[str | None, typer.Option(help="Show these, numbered from 0: 3,10-12.")] = None,
    search: Annotated[str | None, typer.Option(help="Show the first documents that contain this text.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Documents that --search shows.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens shown of a document.")] = 512,
    ids: Annotated[bool, typer.Option("--ids", help="Show every token's id beside it.")] = False,
) -> None:
    """Show what a data set holds; with --documents or --search, single documents."""
    with errors_said():
        file, manifest = IndexedFile(prefix), read_manifest(prefix)
        if documents is None and search is None:
            show_summary(Console(), file, manifest)
            return
        known = None if tokenizer is None else load_tokenizer(tokenizer)
        if known is not None and (warning := warn_of_another_tokenizer(known, manifest)):
            typer.echo(warning, err=True)
        viewer = Viewer(Console(), file, known, max_tokens, ids)
        every = [range(file.num_documents)]
        named = every if documents is None else document_numbers(documents, file.num_documents)
        if search is not None:
            _search(viewer, itertools.chain(*named), text=search, limit=limit)
        else:
            for number in itertools.chain(*named):
                viewer.show(number)


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
