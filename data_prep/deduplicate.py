"""Command: data sets without their exact and near duplicates, within and across them; the first of equals stays.

Memory for a million documents, measured: 65 MB for exact duplicates; for near ones 1.6 GB at the default 16 bands, 5.7
GB at 64. Documents that share half their text with thousands of others, but no more, make the search slow.
Near duplicates are found by MinHash (Broder 1997) with banding and removed only when their exact Jaccard agrees.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
import xxhash
from rensa import RMinHash, RMinHashLSH

from data_prep.exits import errors_said
from data_prep.subset import (
    Change,
    Copied,
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
    same_tokenizer,
)
from megalemur.data.writer import IndexedWriter

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_BATCH_TOKENS = 1 << 18  # shingles that are Python objects at a time: 16 MiB
_REMEMBERED = 256  # documents whose shingles are kept for the next comparison
_LISTED = 1000
_LEAST_CHANCE = 0.9
_BLOCK = 1 << 20
# odd, without a pattern (splitmix64)
_FACTOR, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


class Near(NamedTuple):
    """What counts as a near duplicate."""

    threshold: float
    """Jaccard similarity of the sets of shingles."""
    shingle: int
    """Tokens of a shingle."""
    permutations: int
    """Numbers of a signature."""
    seed: int

    @property
    def bands(self) -> int:
        """Bands of a signature: as few as find a pair at the threshold with a chance of 0.9."""
        divisors = (bands for bands in range(1, self.permutations + 1) if self.permutations % bands == 0)
        return next((bands for bands in divisors if self.chance(bands) >= _LEAST_CHANCE), self.permutations)

    def chance(self, bands: int) -> float:
        """That a pair exactly at the threshold shares a band: 1 - (1 - t^r)^b, Leskovec et al. 2020, section 3.4."""
        return 1 - (1 - self.threshold ** (self.permutations // bands)) ** bands


class Pair(NamedTuple):
    """A document that goes, and the one that stays."""

    removed: int
    kept: int
    similarity: float


class Found(NamedTuple):
    """Duplicates of all sources together; documents are numbered through them."""

    kept: np.ndarray
    """Whether each document stays."""
    starts: list[int]
    """Number of each source's first document, and of documents in all."""
    exact: list[int]
    """Exact duplicates in each source."""
    near: list[int]
    """Near duplicates in each source."""
    pairs: list[list[Pair]]
    """Some of them, of each source."""


class Options(NamedTuple):
    """What the command is asked."""

    prefixes: Annotated[list[Path], typer.Argument(help="Data sets; of equal documents the first one stays.")]
    output: Annotated[Path | None, typer.Option(help="Prefix of the files to write, for one data set.")] = None
    output_directory: Annotated[Path | None, typer.Option(help="Directory for them, under the same names.")] = None
    near: Annotated[float, typer.Option(help="Jaccard similarity of shingles from which documents are duplicates.")] = (
        0.8
    )
    exact_only: Annotated[bool, typer.Option("--exact-only", help="Remove only documents of equal tokens.")] = False
    shingle: Annotated[int, typer.Option(min=1, help="Tokens of a shingle; shorter documents: exact only.")] = 5
    permutations: Annotated[int, typer.Option(min=16, help="Numbers of a MinHash signature.")] = 128
    seed: Annotated[int, typer.Option(min=0, help="Of the signatures.")] = 0
    vocab_size: VocabSize = None
    dry_run: DryRun = False
    overwrite: Overwrite = False


@app.command()
@options_of(Options)
def command(options: Options) -> None:
    """Remove exact and near duplicates, within and across data sets.

    Memory for a million documents: 65 MB with --exact-only, else 1.6 GB; 5.7 GB with --near 0.5. The data are read in
    order and never held.

    A changed token changes every shingle that holds it: at --shingle 5, documents with 2 % of their tokens changed here
    and there have a similarity of 0.82, with 5 % 0.63, but 0.89 with 5 % changed in one piece. A pair exactly at the
    threshold is found with a chance of at least 0.9 (0.95 with the defaults), a more similar one with more.
    """
    began = time.monotonic()
    with errors_said():
        wanted = _near(options)
        outputs = _outputs(options, wanted)
        sources = [open_dataset(prefix, options.vocab_size) for prefix in options.prefixes]
        same_tokenizer(sources)
        found = find_duplicates(sources, wanted)
        write(sources, outputs, found=found, near=wanted)
    removed = "would be removed" if options.dry_run else "removed"
    for source, exact, alike in zip(sources, found.exact, found.near, strict=True):
        total = source.file.num_documents
        typer.echo(
            f"{source.prefix}: {total - exact - alike:,} of {total:,} documents kept; {exact:,} exact and {alike:,} "
            f"near duplicates {removed}"
        )
    typer.echo(f"{len(sources)} data sets in {time.monotonic() - began:.1f} s")


def _outputs(options: Options, near: Near | None) -> list[Path]:
    """A prefix for each data set; none where nothing is written."""
    prefixes, output, directory = options.prefixes, options.output, options.output_directory
    names = [prefix.name for prefix in prefixes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two data sets have the name {twice[0]!r}; rename one, the outputs have the same names")
    if options.dry_run:
        return []
    if (output is None) == (directory is None):
        raise ValueError("write --output-directory DIR, or --output PREFIX for one data set, or --dry-run")
    if output is not None and len(prefixes) > 1:
        raise ValueError(
            f"--output {output}: is one prefix for {len(prefixes)} data sets; write --output-directory DIR"
        )
    outputs = [output] if output is not None else [(directory or Path()) / name for name in names]
    for path in outputs:
        option = "--output-directory" if directory else "--output"
        made = Made("deduplicate", _arguments(prefixes, path, near), prefixes)
        check_output(option, path, prefixes, overwrite=options.overwrite, made=made)
    return outputs


def _near(options: Options) -> Near | None:
    if options.exact_only:
        return None
    if not 0 < options.near <= 1:
        raise ValueError(f"--near {options.near}: write a similarity above 0, at most 1, such as 0.8; or --exact-only")
    if not options.seed < 1 << 64:
        raise ValueError(f"--seed {options.seed}: write a number from 0 to 2**64 - 1")
    return Near(options.near, options.shingle, options.permutations, options.seed)


def find_duplicates(sources: Sequence[Dataset], near: Near | None) -> Found:
    """What would be removed.

    Args:
        sources: of one tokenizer; an earlier one wins over a later one.
        near: None: exact duplicates only.

    Raises:
        ValueError: the permutations cannot be.
    """
    starts = [0, *np.cumsum([source.file.num_documents for source in sources]).tolist()]
    pairs: list[list[Pair]] = [[] for _ in sources]
    kept = np.ones(starts[-1], bool)
    exact = _mark(_equal(sources, starts[-1]), kept, starts, pairs)
    alike = _Alike(sources, starts, near).find(kept) if near else iter(())
    return Found(kept, starts, exact, _mark(alike, kept, starts, pairs), pairs)


def _mark(found: Iterator[Pair], kept: np.ndarray, starts: list[int], pairs: list[list[Pair]]) -> list[int]:
    """Take documents out; returns how many of each source."""
    counts = [0] * len(pairs)
    for pair in found:
        source = _source_of(pair.removed, starts)
        kept[pair.removed] = False
        counts[source] += 1
        if len(pairs[source]) < _LISTED:
            pairs[source].append(pair)
    return counts


def _source_of(number: int, starts: list[int]) -> int:
    return int(np.searchsorted(starts, number, "right")) - 1


def _equal(sources: Sequence[Dataset], documents: int) -> Iterator[Pair]:
    """Documents of equal tokens, known by the xxh3-128 of them as int32."""
    digests = np.empty((documents, 2), "<u8")
    at = 0
    for block in (block for source in sources for block in document_blocks(source.file)):
        wide = block._replace(tokens=block.tokens.astype("<i4"))
        data = b"".join(xxhash.xxh3_128_digest(document.data) for document in wide.documents())
        digests[at : at + len(block.lengths)] = np.frombuffer(data, "<u8").reshape(-1, 2)
        at += len(block.lengths)
    order = np.lexsort((digests[:, 0], digests[:, 1]))  # stable: the first of equals comes first
    original = -1
    for first in range(1, documents, _BLOCK):
        places = order[first - 1 : first + _BLOCK]
        same = (digests[places[1:]] == digests[places[:-1]]).all(axis=1)
        for place in np.flatnonzero(same).tolist():
            if place == 0:
                original = int(places[0]) if original < 0 else original
            elif not same[place - 1]:
                original = int(places[place])
            yield Pair(int(places[place + 1]), original, 1.0)
        if not same[-1]:
            original = -1


class _Alike:
    """Near duplicates: a document goes when it is as similar as the threshold to one before it that stays."""

    def __init__(self, sources: Sequence[Dataset], starts: list[int], near: Near):
        self._sources, self._starts, self._near = sources, starts, near
        self._index = RMinHashLSH(threshold=near.threshold, num_perm=near.permutations, num_bands=near.bands)
        self._recent: OrderedDict[int, np.ndarray] = OrderedDict()

    def find(self, kept: np.ndarray) -> Iterator[Pair]:
        """Near duplicates among the documents that are still kept; rising."""
        for numbers, shingles in self._batches(kept):
            for number, own, signature in zip(numbers, shingles, self._signatures(shingles), strict=True):
                pair = self._first_alike(number, own, signature)
                if pair is None:
                    self._index.insert(number, signature)
                else:
                    yield pair

    def _batches(self, kept: np.ndarray) -> Iterator[tuple[list[int], list[np.ndarray]]]:
        """Numbers and shingles of documents that have any."""
        numbers: list[int] = []
        shingles: list[np.ndarray] = []
        held = 0
        for source, start in zip(self._sources, self._starts, strict=False):
            for block in document_blocks(source.file):
                for number, document in enumerate(block.documents(), start + block.first):
                    if not kept[number] or len(document) < self._near.shingle:
                        continue
                    numbers.append(number)
                    shingles.append(shingle_hashes(document, self._near.shingle))
                    held += len(document)
                    if held >= _BATCH_TOKENS:
                        yield numbers, shingles
                        numbers, shingles, held = [], [], 0
        yield numbers, shingles

    def _signatures(self, shingles: Sequence[np.ndarray]) -> list[RMinHash]:
        near = self._near
        if len(shingles) > 1 or not shingles or len(shingles[0]) <= _BATCH_TOKENS:
            return RMinHash.from_token_sets([_as_bytes(one) for one in shingles], near.permutations, near.seed)
        signature = RMinHash(near.permutations, near.seed)  # one long document, piece by piece
        for at in range(0, len(shingles[0]), _BATCH_TOKENS):
            signature.update(_as_bytes(shingles[0][at : at + _BATCH_TOKENS]))
        return [signature]

    def _first_alike(self, number: int, own: np.ndarray, signature: RMinHash) -> Pair | None:
        """The first document that is similar enough, by their shingles and not by the estimate."""
        for other in sorted(self._index.query(signature)):
            if self._longest(other) < self._near.threshold * len(own):
                continue
            similarity = jaccard(own, self._shingles(other))
            if similarity >= self._near.threshold:
                return Pair(number, other, similarity)
        return None

    def _longest(self, number: int) -> int:
        """As many shingles as the document can have: too few for some pairs, which need no comparison."""
        source = _source_of(number, self._starts)
        first = number - self._starts[source]
        start, stop = self._sources[source].file.document_bounds(first, first + 1)
        return int(stop - start) - self._near.shingle + 1

    def _shingles(self, number: int) -> np.ndarray:
        """Shingles of a document that was seen before."""
        if number not in self._recent:
            source = _source_of(number, self._starts)
            document = self._sources[source].file.document(number - self._starts[source])
            self._recent[number] = shingle_hashes(document, self._near.shingle)
            if len(self._recent) > _REMEMBERED:
                self._recent.popitem(last=False)
        self._recent.move_to_end(number)
        return self._recent[number]


def shingle_hashes(document: np.ndarray, shingle: int) -> np.ndarray:
    """The set of runs of `shingle` tokens: their 64-bit hashes, rising. Two runs share one with a chance of 2**-64."""
    count = len(document) - shingle + 1
    tokens = document.astype(np.uint64)
    hashes = np.zeros(count, np.uint64)
    for at in range(shingle):
        hashes = (hashes + tokens[at : at + count] + np.uint64(1)) * _FACTOR
        hashes ^= hashes >> np.uint64(30)
        hashes *= _MIX
        hashes ^= hashes >> np.uint64(27)
    return np.unique(hashes)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """|A and B| / |A or B| of two sets, each without repetition."""
    if min(len(one), len(other)) == 0:
        return 0.0
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _as_bytes(hashes: np.ndarray) -> list[bytes]:
    return hashes.astype("<u8").view("V8").tolist()


def write(sources: Sequence[Dataset], outputs: Sequence[Path], *, found: Found, near: Near | None) -> list[Copied]:
    """Write every data set without its duplicates; one that has nothing else becomes an empty one.

    Args:
        sources: where the documents are.
        outputs: a prefix for each, or none.
        found: what stays.
        near: for the manifest.
    """
    copied, prefixes = [], [source.prefix for source in sources]
    for number, (source, output) in enumerate(zip(sources, outputs, strict=False)):
        start, stop = found.starts[number : number + 2]
        change = Change("deduplicate", _arguments(prefixes, output, near), _facts(sources, found, number, near))
        with IndexedWriter(output, vocab_size=source.vocab_size) as writer:
            numbers = _true(found.kept[start:stop])
            copied.append(copy_documents(source.file, numbers, writer, unk_id=source.unk_id))
            commit_subset(writer, source, copied=copied[-1], change=change)
    return copied


def _true(flags: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(flags), _BLOCK):
        yield first + np.flatnonzero(flags[first : first + _BLOCK])


def _arguments(prefixes: Sequence[Path], output: Path, near: Near | None) -> dict[str, Any]:
    chosen = near._asdict() if near else {"exact_only": True}
    return {"prefixes": [str(prefix) for prefix in prefixes], "output": str(output), **chosen}


def _facts(sources: Sequence[Dataset], found: Found, number: int, near: Near | None) -> dict[str, Any]:
    """What happened to all sources, and the pairs of one."""
    names = [source.prefix.name for source in sources]

    def place(document: int) -> str:
        source = _source_of(document, found.starts)
        return f"{names[source]}:{document - found.starts[source]}"

    pairs = found.pairs[number]
    facts: dict[str, Any] = {
        "exact_duplicates": dict(zip(names, found.exact, strict=True)),
        "near_duplicates": dict(zip(names, found.near, strict=True)),
        "sources": {name: source.file.digest for name, source in zip(names, sources, strict=True)},
        "pairs": [f"{place(a)} duplicates {place(b)}, similarity {s:.3f}" for a, b, s in pairs],
        "pairs_not_listed": found.exact[number] + found.near[number] - len(pairs),
    }
    if near:
        facts |= {"engine": f"rensa {version('rensa')}", "bands": near.bands}
        facts["chance_at_threshold"] = round(near.chance(near.bands), 4)
    return facts


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
