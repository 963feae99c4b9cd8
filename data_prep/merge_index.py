"""Command: several data sets, or all parts of one build, as one data set."""

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from data_prep.exits import errors_said
from data_prep.join import copy_shuffled
from data_prep.merge import append_all, in_order, merged_inputs, read_manifests, tokenizer_of
from data_prep.subset import Made, Overwrite, VocabSize, check_output
from data_prep.verify import open_trusted
from megalemur.data.indexed import IndexedFile, prefix_of
from megalemur.data.manifest import Manifest, Origin
from megalemur.data.writer import IndexedWriter, Written, own_scratch

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
    vocab_size: VocabSize = None,
    overwrite: Overwrite = False,
) -> None:
    """Put data sets one after another. Parts of one build (--part) are put into their order and must be complete."""
    began = time.monotonic()
    with errors_said():
        sources = [prefix_of(path) for path in prefixes]
        made = Made("merge_index", _arguments(sources, shuffle), sources)
        check_output("--output", output, sources, overwrite=overwrite, made=made)
        written = merge(sources, output, shuffle=shuffle, vocab_size=vocab_size)
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

    # of this process alone: another that merges to the same place must not take its files for ours
    between = own_scratch(Path(f"{output}.ordered"))
    target = output if shuffle is None else between / output.name
    try:
        with IndexedWriter(target, vocab_size=size) as writer:
            for file in files:
                append_all(file, writer)
            if not writer.num_documents:
                raise ValueError(f"--output {output}: would be empty, none of these data sets has a document")
            writer.commit(manifest_of if known and shuffle is None else None)
            written = Written(writer.num_documents, writer.num_tokens, writer.dtype.name, "", {})
        if shuffle is not None:
            with IndexedWriter(output, vocab_size=size) as writer:
                copy_shuffled(IndexedFile(target), shuffle, writer)
                writer.commit(manifest_of if known else None)
    finally:
        shutil.rmtree(between, ignore_errors=True)
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
            arguments=_arguments(prefixes, shuffle),
            facts={"engine": first.origin.facts.get("engine")},
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            parents=tuple(manifest.digest for manifest in manifests),
        ),
    )


def _arguments(prefixes: Sequence[Path], shuffle: int | None) -> dict[str, Any]:
    return {"prefixes": [str(prefix) for prefix in prefixes], "shuffle": shuffle}


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
