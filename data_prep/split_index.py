"""Command: one data set as two, for training and validation, by a hash of each document's own tokens.

So a document's side depends on nothing but the document: not on its place, nor on what else there is.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
import xxhash

from data_prep.exits import errors_said
from data_prep.subset import (
    Change,
    Copied,
    Dataset,
    Made,
    Overwrite,
    VocabSize,
    check_output,
    commit_subset,
    copy_documents,
    document_blocks,
    open_dataset,
)
from megalemur.data.indexed import IndexedFile
from megalemur.data.writer import IndexedWriter

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Sides(NamedTuple):
    """What went where."""

    train: Copied
    validation: Copied


@app.command()
def command(
    prefix: Annotated[Path, typer.Argument(help="Prefix of the data set to split.")],
    train: Annotated[Path, typer.Option(help="Prefix of the files to write for training.")],
    validation: Annotated[Path, typer.Option(help="Prefix of the files to write for validation.")],
    validation_share: Annotated[float, typer.Option(help="Share of the documents, above 0 and below 1.")] = 0.001,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another split.")] = 0,
    vocab_size: VocabSize = None,
    overwrite: Overwrite = False,
) -> None:
    """Split a data set by a hash of each document, so that equal documents are always on the same side.

    The split stays where it is when documents are added, put into another order or built again. The share is met as
    closely as chance allows: of 100,000 documents, 0.001 is 100 give or take 10.
    """
    began = time.monotonic()
    with errors_said():
        arguments = _arguments(prefix, train, validation, share=validation_share, seed=seed)
        made = Made("split_index", arguments, [prefix])
        check_output("--train", train, [prefix, validation], overwrite=overwrite, made=made)
        check_output("--validation", validation, [prefix, train], overwrite=overwrite, made=made)
        source = open_dataset(prefix, vocab_size)
        sides = split(source, train, validation, share=validation_share, seed=seed)
    typer.echo(
        f"{prefix}: {sides.train.documents:,} documents, {sides.train.tokens:,} tokens to {train}; "
        f"{sides.validation.documents:,} documents, {sides.validation.tokens:,} tokens to {validation} "
        f"in {time.monotonic() - began:.1f} s"
    )


def split(source: Dataset, train: Path, validation: Path, *, share: float, seed: int) -> Sides:
    """Write both sides; neither appears where one of them would be empty.

    Args:
        source: what is split.
        train: prefix.
        validation: prefix.
        share: of the documents, for validation.
        seed: of the hash, below 2**64.

    Raises:
        ValueError: the share or the seed cannot be, or a side would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"--validation-share {share}: write a share above 0 and below 1, such as 0.001")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"--seed {seed}: write a number from 0 to 2**64 - 1")
    below = int(share * 2**64)
    count = sum(len(block) for block in _numbers(source.file, True, below, seed))
    total = source.file.num_documents
    if count in (0, total):
        side = "--validation" if count == 0 else "--train"
        raise ValueError(
            f"{side}: would be empty, {count:,} of {total:,} documents fall to validation; change --validation-share "
            f"{share} or --seed {seed}"
        )
    arguments = _arguments(source.prefix, train, validation, share=share, seed=seed)
    facts = {"hash": "xxh3_64 of the tokens as int32", "validation_documents": count}
    size = source.vocab_size
    with IndexedWriter(train, vocab_size=size) as rest, IndexedWriter(validation, vocab_size=size) as chosen:
        sides = Sides(
            copy_documents(source.file, _numbers(source.file, False, below, seed), rest, unk_id=source.unk_id),
            copy_documents(source.file, _numbers(source.file, True, below, seed), chosen, unk_id=source.unk_id),
        )
        for writer, (side, copied) in zip((rest, chosen), sides._asdict().items(), strict=True):
            change = Change("split_index", arguments, {"side": side, **facts})
            commit_subset(writer, source, copied=copied, change=change)
    return sides


def _arguments(prefix: Path, train: Path, validation: Path, *, share: float, seed: int) -> dict[str, Any]:
    paths = {"prefix": str(prefix), "train": str(train), "validation": str(validation)}
    return {**paths, "validation_share": share, "seed": seed}


def _numbers(file: IndexedFile, validation: bool, below: int, seed: int) -> Iterator[np.ndarray]:
    """Numbers of the documents of one side: those whose hash is below a bound, or the others.

    int32, because data of one tokenizer may be stored in two dtypes.
    """
    for block in document_blocks(file):
        wide = block._replace(tokens=block.tokens.astype("<i4"))
        hashes = (xxhash.xxh3_64_intdigest(document.data, seed) < below for document in wide.documents())
        yield block.first + np.flatnonzero(np.fromiter(hashes, bool, len(block.lengths)) == validation)


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
