"""Command: several data sets, or all parts of one build, as one data set."""

import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_prep.join import copy_shuffled
from data_prep.merge import append_all, in_order, merged_inputs, open_trusted, read_manifests, tokenizer_of
from megalemur.data.errors import DataError
from megalemur.data.indexed import IndexedFile, bin_path, idx_path, prefix_of
from megalemur.data.manifest import Manifest, Origin
from megalemur.data.writer import IndexedWriter, Written

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def command(
    prefixes: Annotated[
        list[Path],
        typer.Argument(metavar="PREFIX...", help="Data sets, with or without .idx, in the order of the result."),
    ],
    output: Annotated[Path, typer.Option(help="Prefix of the files to write.")],
    shuffle: Annotated[
        int | None, typer.Option(min=0, metavar="SEED", help="Put the documents into a seeded order.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="For data sets without a manifest.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set of the same name.")] = False,
) -> None:
    """Put data sets one after another. Parts of one build (--part) are put into their order and must be complete."""
    began = time.monotonic()
    try:
        if idx_path(output).exists() and not overwrite:
            raise ValueError(f"--output {output}: {idx_path(output)} is there; choose another, or add --overwrite")
        written = merge([prefix_of(path) for path in prefixes], output, shuffle=shuffle, vocab_size=vocab_size)
    except (ValueError, DataError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    Console().print(
        f"{output}: {written.documents:,} documents, {written.tokens:,} tokens of {len(prefixes)} data sets in "
        f"{time.monotonic() - began:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def merge(prefixes: Sequence[Path], output: Path, *, shuffle: int | None, vocab_size: int | None) -> Written:
    """Merge data sets that belong together.

    Raises:
        ValueError: they do not.
        DataError: one is damaged.
    """
    manifests = read_manifests(prefixes)
    _, size = tokenizer_of(manifests, vocab_size)
    known = [manifest for manifest in manifests if manifest is not None]
    pairs: list[tuple[Path, Manifest | None]] = (
        list(in_order(prefixes, known)) if known else [(p, None) for p in prefixes]
    )
    files = [open_trusted(prefix, manifest) for prefix, manifest in pairs]
    result: list[Written] = []

    def manifest_of(written: Written) -> Manifest:
        result.append(written)
        return merged_manifest([manifest for _, manifest in pairs if manifest], written, prefixes, shuffle)

    target = output if shuffle is None else output.with_name(f".{output.name}.ordered")
    try:
        with IndexedWriter(target, vocab_size=size) as writer:
            for file in files:
                append_all(file, writer)
            writer.commit(manifest_of if known and shuffle is None else None)
            written = Written(writer.num_documents, writer.num_tokens, writer.dtype.name, "", {})
        if shuffle is not None:
            with IndexedWriter(output, vocab_size=size) as writer:
                copy_shuffled(IndexedFile(target), shuffle, writer)
                writer.commit(manifest_of if known else None)
    finally:
        if target != output:
            bin_path(target).unlink(missing_ok=True)
            idx_path(target).unlink(missing_ok=True)
    return result[-1] if result else written


def merged_manifest(
    manifests: Sequence[Manifest], written: Written, prefixes: Sequence[Path], shuffle: int | None
) -> Manifest:
    """The manifest of the whole."""
    first = manifests[0]
    control = sum((Counter(manifest.control_strings) for manifest in manifests), Counter[str]())
    return Manifest(
        **written._asdict(),
        tokenizer=first.tokenizer,
        prepend_bos=first.prepend_bos,
        append_eos=first.append_eos,
        unknown_tokens=sum(manifest.unknown_tokens for manifest in manifests),
        control_strings=dict(control),
        inputs=merged_inputs(manifests),
        bad=tuple(bad for manifest in manifests for bad in manifest.bad),
        plan=first.plan if first.part else None,
        origin=Origin(
            tool="merge_index",
            version=version("megalemur"),
            arguments={"prefixes": [str(prefix) for prefix in prefixes], "shuffle": shuffle},
            facts={"engine": first.origin.facts.get("engine")},
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            parents=tuple(manifest.digest for manifest in manifests),
        ),
    )


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
