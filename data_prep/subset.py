"""Part of a data set as a new one: chosen documents, copied in constant memory, and a manifest that names the parent.

Also what commands that make one have in common: how they open, what they refuse to replace, how they take options.
Refuses document numbers that do not rise, and data sets whose vocabulary nobody says.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

import numpy as np
import orjson
import typer

from data_prep.verify import open_trusted
from megalemur.data.errors import DamagedDataError, DataError
from megalemur.data.indexed import IndexedFile, bin_path, idx_path
from megalemur.data.manifest import InputRecord, Manifest, Origin, manifest_path, read_manifest
from megalemur.data.writer import IndexedWriter, Written

_BLOCK_DOCUMENTS = 1 << 18
_BLOCK_TOKENS = 1 << 22  # 16 MiB at most, but for a document that is longer
_LONGEST = np.iinfo(np.int32).max


Options = TypeVar("Options", bound=tuple[Any, ...])

VocabSize = Annotated[int | None, typer.Option(min=1, help="Number of ids, for data without a manifest.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a data set of the same name.")]


class Dataset(NamedTuple):
    """A data set that is read."""

    prefix: Path
    file: IndexedFile
    manifest: Manifest | None
    vocab_size: int
    """Every id is below it."""

    @property
    def unk_id(self) -> int | None:
        """Id of the unknown token, where it is known."""
        return self.manifest.tokenizer.unk_id if self.manifest else None


class Block(NamedTuple):
    """Consecutive documents."""

    first: int
    """Number of the first one."""
    tokens: np.ndarray
    """All of them, one after another."""
    lengths: np.ndarray
    """Tokens of each, int64; 0 for an empty one, which only other tools write."""

    @property
    def numbers(self) -> np.ndarray:
        """Number of each document."""
        return np.arange(self.first, self.first + len(self.lengths))

    def documents(self) -> Iterator[np.ndarray]:
        """Tokens of each document."""
        yield from (self.tokens[start:stop] for start, stop in pairwise(_ends(self.lengths)))


class Copied(NamedTuple):
    """What was copied."""

    documents: int
    tokens: int
    empty_documents: int
    """Chosen, but left out: they have no tokens."""
    unknown_tokens: int


class Made(NamedTuple):
    """A command with its arguments and the data sets that it reads."""

    tool: str
    arguments: Mapping[str, Any]
    parents: Sequence[Path]

    def of(self, output: Path) -> bool:
        """Whether a data set was made by this command, of these parents as they are now."""
        try:
            manifest = read_manifest(output)
            known = {parent.digest for parent in map(read_manifest, self.parents) if parent}
        except DamagedDataError:
            return False
        if manifest is None or manifest.origin.tool != self.tool or not set(manifest.origin.parents) <= known:
            return False
        return dict(manifest.origin.arguments) == orjson.loads(orjson.dumps(self.arguments))


class Change(NamedTuple):
    """What a tool did to its parent, for the manifest's origin."""

    tool: str
    arguments: Mapping[str, Any]
    facts: Mapping[str, Any]


def open_dataset(prefix: Path, vocab_size: int | None = None) -> Dataset:
    """A data set with its manifest, or one of another tool with the vocabulary that the user names.

    Args:
        prefix: path without the ending.
        vocab_size: what --vocab-size says.

    Raises:
        ValueError: nobody says the vocabulary, or the manifest says another one.
        DataError: missing or damaged, or not the files of the manifest.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        if vocab_size is None:
            raise ValueError(f"{manifest_path(prefix)}: no such file; add --vocab-size N, the tokenizer's size")
        return Dataset(prefix, IndexedFile(prefix), None, vocab_size)
    known = manifest.tokenizer.vocab_size
    if vocab_size not in (None, known):
        raise ValueError(f"--vocab-size {vocab_size}: {manifest_path(prefix)} says {known}; leave the option out")
    return Dataset(prefix, open_trusted(prefix, manifest), manifest, known)


def check_output(
    option: str, output: Path, sources: Iterable[Path], *, overwrite: bool, made: Made | None = None
) -> None:
    """Refuse an output that is an input, or that is there already, unless `made` says what made it.

    A command of several outputs may be killed between them: given again, it replaces its own by the same.

    Raises:
        ValueError: it is.
    """
    if output.resolve() in {source.resolve() for source in sources}:
        raise ValueError(f"{option} {output}: is an input; choose another prefix")
    if idx_path(output).exists() and not overwrite and not (made and made.of(output)):
        raise ValueError(f"{option} {output}: {idx_path(output)} is there; choose another, or add --overwrite")


def document_blocks(source: IndexedFile, first: int = 0, stop: int | None = None) -> Iterator[Block]:
    """Documents [first, stop) in order, as many at a time as fit 16 MiB; one that is larger comes alone.

    Raises:
        IndexError: the range is not within the documents.
    """
    stop = source.num_documents if stop is None else stop
    for at in range(first, stop, _BLOCK_DOCUMENTS):
        bounds = source.document_bounds(at, min(at + _BLOCK_DOCUMENTS, stop))
        begin = 0
        while begin < len(bounds) - 1:
            full = int(np.searchsorted(bounds, bounds[begin] + _BLOCK_TOKENS, "right")) - 1
            end = max(begin + 1, full)
            tokens = source.tokens(int(bounds[begin]), int(bounds[end]))
            yield Block(at + begin, tokens, np.diff(bounds[begin : end + 1]))
            begin = end


def copy_documents(
    source: IndexedFile, numbers: Iterable[np.ndarray], writer: IndexedWriter, *, unk_id: int | None = None
) -> Copied:
    """Append chosen documents to a data set, in constant memory; what is written does not depend on the blocks.

    Args:
        source: where they are.
        numbers: blocks of document numbers, rising within and across blocks.
        writer: where they go.
        unk_id: counted as unknown token; None: nothing is.

    Raises:
        ValueError: the numbers do not rise, or a document is longer than the format can say.
        IndexError: there is no such document.
    """
    copied = np.zeros(4, np.int64)
    waiting: list[Block] = []
    held = 0
    for block in (block for first, stop in _runs(numbers) for block in document_blocks(source, first, stop)):
        if held and held + block.tokens.size > _BLOCK_TOKENS:
            copied += _write(waiting, writer, unk_id)
            waiting, held = [], 0
        waiting.append(block)
        held += block.tokens.size + 1  # so that a long list of empty documents also comes to an end
    if waiting:
        copied += _write(waiting, writer, unk_id)
    return Copied(*copied.tolist())


def _runs(numbers: Iterable[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers as [first, stop), joined across blocks."""
    first = stop = -1
    for block in numbers:
        if not len(block):
            continue
        if int(block[0]) < max(stop, 0) or (np.diff(block) <= 0).any():
            raise ValueError(f"document numbers must rise; {int(block[0])} or one soon behind it does not")
        borders = [0, *(np.flatnonzero(np.diff(block) != 1) + 1).tolist(), len(block)]
        for start, end in pairwise(borders):
            if int(block[start]) != stop:
                if stop > first:
                    yield first, stop
                first = int(block[start])
            stop = int(block[end - 1]) + 1
    if stop > first:
        yield first, stop


def _write(blocks: list[Block], writer: IndexedWriter, unk_id: int | None) -> np.ndarray:
    """Append in one call: (documents, tokens, empty documents, unknown tokens)."""
    lengths = np.concatenate([block.lengths for block in blocks])
    tokens = blocks[0].tokens if len(blocks) == 1 else np.concatenate([block.tokens for block in blocks])
    full = lengths[lengths > 0]
    if full.size and int(full.max()) > _LONGEST:
        raise ValueError(f"{writer.prefix}: a document has {int(full.max())} tokens, the format ends at {_LONGEST}")
    writer.add_many(tokens, full)
    unknown = 0 if unk_id is None else int(np.count_nonzero(tokens == unk_id))
    return np.array([full.size, tokens.size, lengths.size - full.size, unknown])


def commit_subset(writer: IndexedWriter, source: Dataset, *, copied: Copied, change: Change) -> None:
    """Make a part appear; it has a manifest where its parent has one.

    Args:
        writer: holds what was copied.
        source: the parent.
        copied: what `copy_documents` said.
        change: what chose the documents.
    """
    parent = source.manifest
    if parent is None:
        writer.commit()
    else:
        writer.commit(lambda written: subset_manifest(source.prefix, parent, written, copied=copied, change=change))


def subset_manifest(prefix: Path, parent: Manifest, written: Written, *, copied: Copied, change: Change) -> Manifest:
    """The manifest of a part: one input, which is the parent.

    How many bytes of text became the tokens that are left is not known, unless all of them are: 0 stands for that.
    Counts of control strings are then the parent's, which are an upper bound, and origin.facts says so.
    """
    whole = copied.tokens == parent.tokens
    stat = bin_path(prefix).stat()
    source = InputRecord(
        name=str(prefix),
        bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        documents=copied.documents,
        empty_documents=copied.empty_documents,
        bad=0,
        tokens=copied.tokens,
        text_bytes=parent.text_bytes if whole else 0,
    )
    facts = dict(change.facts)
    if parent.control_strings and not whole:
        facts["control_strings"] = "counts of the parent: an upper bound"
    return Manifest(
        **written._asdict(),
        tokenizer=parent.tokenizer,
        prepend_bos=parent.prepend_bos,
        append_eos=parent.append_eos,
        unknown_tokens=copied.unknown_tokens,
        control_strings=dict(parent.control_strings),
        inputs=(source,),
        origin=Origin(
            tool=change.tool,
            version=version("megalemur"),
            arguments=change.arguments,
            facts=facts,
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            parents=(parent.digest,),
        ),
    )


def _ends(lengths: np.ndarray) -> list[int]:
    return [0, *np.cumsum(lengths).tolist()]


def same_tokenizer(sources: Iterable[Dataset]) -> None:
    """Refuse data sets whose ids do not mean the same.

    Raises:
        DataError: they were made with different tokenizers, or have different vocabularies.
    """
    first: Dataset | None = None
    for one in sources:
        first = first or one
        known = first.manifest and one.manifest and first.manifest.tokenizer.sha256 != one.manifest.tokenizer.sha256
        if known or first.vocab_size != one.vocab_size:
            raise DataError(
                f"{one.prefix}: made with another tokenizer than {first.prefix}; build one of them again, equal text "
                "must be equal tokens"
            )


def options_of(kind: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """For a command with too many options for parameters: typer reads them from the fields of a NamedTuple."""
    hints = get_type_hints(kind, include_extras=True)
    defaults: Mapping[str, Any] = getattr(kind, "_field_defaults", {})

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            function(kind(**values))

        parameter, keyword = inspect.Parameter, inspect.Parameter.KEYWORD_ONLY
        fields = [
            parameter(name, keyword, default=defaults.get(name, parameter.empty), annotation=hint)
            for name, hint in hints.items()
        ]
        command.__dict__["__signature__"] = inspect.Signature(fields)
        command.__annotations__ = hints
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate
