"""Command: a data set without the documents that hold text of a benchmark.

The rule is the one of GPT-3 (Brown et al. 2020, appendix C): a shared n-gram of 13 words, lower-case, without
punctuation. It misses what was translated, renamed throughout or rewritten.
"""

import gzip
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import orjson
import typer

from data_prep.exits import errors_said
from data_prep.subset import (
    Block,
    Change,
    Dataset,
    DryRun,
    Made,
    Overwrite,
    VocabSize,
    check_output,
    commit_subset,
    copy_documents,
    document_blocks,
    open_dataset,
    options_of,
)
from data_prep.tokenizer import Tokenizer, load_tokenizer
from megalemur.data.writer import IndexedWriter

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_WORD = re.compile(r"\w+")
_NAMES = ("task_id", "id", "name")
_FACTOR, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


class Text(NamedTuple):
    """One text of a benchmark."""

    name: str
    """Entry: its task_id, id or name, else file:line."""
    words: list[str]


class Hit(NamedTuple):
    """What a document shares with a benchmark."""

    entry: str
    ngram: str


@dataclass
class Tally:
    """Counts of a scan."""

    documents: int = 0
    removed: int = 0
    entries: dict[str, int] = field(default_factory=dict)
    """Documents that hold each entry found."""

    def facts(self, grams: "Grams") -> dict[str, Any]:
        """For the manifest."""
        return {
            "removed": self.removed,
            "entries": grams.entries,
            "entries_found": len(self.entries),
            "ngrams": grams.count,
            "compared_whole": grams.short,
            "compared_with_whole_documents": grams.tiny,
        }


class Options(NamedTuple):
    """What the command is asked."""

    prefix: Annotated[Path, typer.Argument(help="Prefix of the data set.")]
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer that made it.")]
    benchmarks: Annotated[
        list[Path], typer.Option("--benchmark", help=".jsonl, .jsonl.gz, or .txt (one text a file); repeatable.")
    ]
    key: Annotated[str | None, typer.Option(help="Keys of the texts in JSON lines, with commas; else all.")] = None
    ngram: Annotated[int, typer.Option(min=1, help="Words in a row that must not be shared.")] = 13
    shortest: Annotated[
        int, typer.Option(min=1, help="Texts below --ngram words but not below this are searched as a whole.")
    ] = 8
    output: Annotated[Path | None, typer.Option(help="Prefix of the files to write.")] = None
    report: Annotated[Path | None, typer.Option(help="JSON lines to write: document, entry, n-gram.")] = None
    vocab_size: VocabSize = None
    dry_run: DryRun = False
    overwrite: Overwrite = False


@app.command()
@options_of(Options)
def command(options: Options) -> None:
    """Remove documents that share 13 words in a row with a benchmark: lower-case runs of letters, digits and _.

    Benchmark texts with fewer words are searched as a whole. Those below --shortest words would be found everywhere:
    only a document that has no other words is removed for them. Numbers are words, and tests hold rows of them that
    innocent documents have too: name the keys of what counts, such as --key prompt,canonical_solution for HumanEval,
    and read --report.
    """
    began = time.monotonic()
    with errors_said():
        if (options.output is None) != options.dry_run:
            raise ValueError("write either --output PREFIX or --dry-run")
        asked = _arguments(options)
        if options.output is not None:
            made = Made("decontaminate", asked, [options.prefix])
            check_output("--output", options.output, [options.prefix], overwrite=options.overwrite, made=made)
        texts = read_benchmarks(options.benchmarks, options.key.split(",") if options.key else None)
        grams = Grams(texts, options.ngram, min(options.shortest, options.ngram))
        source, decoder = _opened(options.prefix, options.tokenizer, options.vocab_size)
        tally = decontaminate(source, Scanner(decoder, grams), options.output, arguments=asked, report=options.report)
    removed = f"{tally.removed:,} {'would be ' if options.dry_run else ''}removed"
    typer.echo(
        f"{options.prefix}: {tally.documents - tally.removed:,} of {tally.documents:,} documents kept, {removed}; "
        f"{len(tally.entries):,} of {grams.entries:,} benchmark entries found; {grams.short:,} texts below "
        f"{options.ngram} words searched as a whole, {grams.tiny:,} below {options.shortest} compared with whole "
        f"documents, in {time.monotonic() - began:.1f} s"
    )


def _arguments(options: Options) -> dict[str, Any]:
    return {
        "prefix": str(options.prefix),
        "tokenizer": str(options.tokenizer),
        "benchmarks": [str(path) for path in options.benchmarks],
        "key": options.key,
        "ngram": options.ngram,
        "shortest": options.shortest,
    }


def _opened(prefix: Path, path: Path, vocab_size: int | None) -> tuple[Dataset, Tokenizer]:
    """The data set and the tokenizer that made it."""
    source, tokenizer = open_dataset(prefix, vocab_size), load_tokenizer(path)
    if source.manifest and source.manifest.tokenizer.sha256 != tokenizer.record.sha256:
        raise ValueError(
            f"--tokenizer {path}: sha256 {tokenizer.record.sha256[:16]}…, but {prefix} was made with "
            f"{source.manifest.tokenizer.sha256[:16]}…; give that one"
        )
    return source, tokenizer


def words_of(text: str) -> list[str]:
    """Lower-case runs of letters, digits and underscores."""
    return _WORD.findall(text.lower())


def read_benchmarks(files: Sequence[Path], keys: Sequence[str] | None) -> Iterator[Text]:
    """The texts of benchmarks.

    Args:
        files: .jsonl or .jsonl.gz: an entry a line; else a text a file.
        keys: of the texts in an entry; None: every string in it, at any depth.

    Raises:
        ValueError: file:line, and what is wrong there.
        OSError: a file cannot be read.
    """
    for path in files:
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"--benchmark {path}: cannot be decompressed ({error}); fetch it again") from None
        if ".jsonl" in path.suffixes:
            for number, line in enumerate(data.splitlines(), 1):
                if line.strip():
                    yield from _entry(line, keys, f"{path}:{number}")
            continue
        try:
            yield Text(str(path), words_of(data.decode()))
        except UnicodeDecodeError as error:
            raise ValueError(f"--benchmark {path}: not UTF-8 ({error}); give .jsonl, .jsonl.gz or text") from None


def _entry(line: bytes, keys: Sequence[str] | None, where: str) -> Iterator[Text]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"--benchmark {where}: not JSON in UTF-8 ({error}); mend or remove the line") from None
    if not isinstance(record, dict):
        raise ValueError(f"--benchmark {where}: no JSON object; give one with texts in it")
    missing = [key for key in keys or () if key not in record]
    if missing:
        there = ", ".join(map(repr, record)) or "no keys"
        raise ValueError(f"--benchmark {where}: no key {missing[0]!r} (it has {there}); name the right ones with --key")
    name = next((str(record[key]) for key in _NAMES if isinstance(record.get(key), str | int)), where)
    for value in record.values() if keys is None else [record[key] for key in keys]:
        yield from (Text(name, words_of(text)) for text in _strings(value))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


class Grams:
    """The n-grams of benchmarks: words to numbers, and a rising array of hashes for each length of n-gram."""

    def __init__(self, texts: Iterable[Text], ngram: int, shortest: int):
        """Take the texts in; 100 to 200 bytes a word of the benchmarks.

        Args:
            texts: of all benchmarks.
            ngram: words of an n-gram.
            shortest: texts of fewer words are compared with whole documents.

        Raises:
            ValueError: there is no word in them.
        """
        self._numbers: dict[str, int] = {}
        self._entries: dict[tuple[int, ...], tuple[str, ...]] = {}
        self._whole: dict[tuple[int, ...], tuple[str, ...]] = {}
        self.short = self.tiny = 0
        names = set()
        for name, words in texts:
            if words:
                names.add(name)
                self._add(name, words, ngram, shortest)
        if not names:
            raise ValueError("--benchmark: there are no words in it; give texts, or other keys with --key")
        self.entries, self.count = len(names), len(self._entries)
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for gram in self._entries:
            by_length.setdefault(len(gram), []).append(gram)
        self._hashes = {
            length: np.unique(_rolling(np.array(grams, np.uint64).ravel(), length)[::length])
            for length, grams in by_length.items()
        }

    def _add(self, name: str, words: Sequence[str], ngram: int, shortest: int) -> None:
        row = tuple(self._numbers.setdefault(word, len(self._numbers) + 1) for word in words)
        tiny = len(words) < shortest
        self.tiny += tiny
        self.short += not tiny and len(words) < ngram
        grams = [row] if tiny else [row[at : at + ngram] for at in range(max(1, len(row) - ngram + 1))]
        where = self._whole if tiny else self._entries
        for gram in grams:
            names = where.get(gram, ())
            if name not in names:
                where[gram] = (*names, name)

    def hits(self, words: Sequence[str]) -> list[Hit]:
        """What these words of a document share with benchmarks: the first n-gram of each entry."""
        get = self._numbers.get
        row = [get(word, 0) for word in words]
        numbers = np.array(row, np.uint64)
        found: dict[str, str] = {}
        for length, hashes in self._hashes.items():
            if len(row) < length:
                continue
            windows = _rolling(numbers, length)
            places = np.searchsorted(hashes, windows)
            places[places == len(hashes)] = 0
            for at in np.flatnonzero(hashes[places] == windows).tolist():
                for entry in self._entries.get(tuple(row[at : at + length]), ()):
                    found.setdefault(entry, " ".join(words[at : at + length]))
        for entry in self._whole.get(tuple(row), ()) if self._whole else ():
            found.setdefault(entry, " ".join(words))
        return [Hit(*one) for one in found.items()]


def _rolling(numbers: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of each run of `length` numbers."""
    count = len(numbers) - length + 1
    hashes = np.zeros(count, np.uint64)
    for at in range(length):
        hashes = (hashes + numbers[at : at + count]) * _FACTOR
        hashes ^= hashes >> np.uint64(30)
        hashes *= _MIX
    return hashes


class Scanner:
    """Finds what documents share with benchmarks."""

    def __init__(self, tokenizer: Tokenizer, grams: Grams):
        self._tokenizer, self.grams = tokenizer, grams
        self._ends = {tokenizer.record.bos_id, tokenizer.record.eos_id}

    def scan(self, block: Block) -> list[list[Hit]]:
        """What each document shares.

        Raises:
            ValueError: an id is none of the tokenizer's.
        """
        size = self._tokenizer.record.vocab_size
        if block.tokens.size and not 0 <= int(block.tokens.min()) <= int(block.tokens.max()) < size:
            raise ValueError(
                f"--tokenizer: has {size:,} ids, document {block.first} or one soon behind it others; give the "
                "tokenizer that made the data"
            )
        return [self.grams.hits(words_of(self._text(document))) for document in block.documents()]

    def _text(self, document: np.ndarray) -> str:
        ids = document.tolist()
        start, stop = ids[:1] and ids[0] in self._ends, len(ids) > 1 and ids[-1] in self._ends
        return self._tokenizer.decode(ids[bool(start) : len(ids) - bool(stop)])


def decontaminate(
    source: Dataset, scanner: Scanner, output: Path | None, *, arguments: dict[str, Any], report: Path | None = None
) -> Tally:
    """Write the documents that share nothing with a benchmark, in constant memory.

    Args:
        source: the data set.
        scanner: finds what is shared.
        output: prefix; None: only count.
        arguments: for the manifest.
        report: JSON lines to write, one a document and entry.

    Raises:
        ValueError: ids that are not the tokenizer's, or no document is left.
    """
    tally = Tally()
    with _lines(report) as add:
        clean = _clean(source, scanner, tally, add)
        if output is None:
            for _ in clean:
                pass
            return tally
        with IndexedWriter(output, vocab_size=source.vocab_size) as writer:
            copied = copy_documents(source.file, clean, writer, unk_id=source.unk_id)
            if not copied.documents:
                raise ValueError(
                    f"--output {output}: would be empty, {tally.removed:,} documents share text; look at "
                    "them with --dry-run --report FILE.jsonl"
                )
            change = Change("decontaminate", arguments, tally.facts(scanner.grams))
            commit_subset(writer, source, copied=copied, change=change)
    return tally


def _clean(source: Dataset, scanner: Scanner, tally: Tally, add: Callable[[bytes], object]) -> Iterator[np.ndarray]:
    """Numbers of documents that share nothing, by blocks; counts and reports the others on the way."""
    for block in document_blocks(source.file):
        found = scanner.scan(block)
        clean = np.array([not hits for hits in found], bool)
        for number in np.flatnonzero(~clean).tolist():
            for hit in found[number]:
                tally.entries[hit.entry] = tally.entries.get(hit.entry, 0) + 1
                add(orjson.dumps({"document": block.first + number, **hit._asdict()}) + b"\n")
        tally.documents += len(clean)
        tally.removed += int((~clean).sum())
        yield block.first + np.flatnonzero(clean)


@contextmanager
def _lines(path: Path | None) -> Iterator[Callable[[bytes], object]]:
    """Takes lines for a file that appears when all are there."""
    if path is None:
        yield len
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream.write
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
