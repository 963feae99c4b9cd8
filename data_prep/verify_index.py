"""Command: is a data set what was written? Reads every byte."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_prep.exits import DAMAGED
from data_prep.verify import refreshed, verify
from megalemur.data.errors import DataError
from megalemur.data.indexed import prefix_of
from megalemur.data.manifest import manifest_path, write_atomically

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def command(
    prefixes: Annotated[list[Path], typer.Argument(metavar="PREFIX...", help="Data sets, with or without .idx.")],
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Ids must be below it; without it, the manifest's.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read.")] = (os.cpu_count() or 1),
) -> None:
    """Check structure, digests, ids and document ends; where all is well, the manifest vouches for the files again.

    Exit code 12: something is damaged; each damaged range is named.
    """
    console, bad = Console(), False
    for prefix in map(prefix_of, prefixes):
        began = time.monotonic()
        try:
            verified = verify(prefix, vocab_size=vocab_size, threads=workers)
            problems = verified.problems
        except (DataError, OSError) as error:
            problems = [str(error)]
        if problems:
            bad = True
            for problem in problems:
                typer.echo(f"error: {problem}", err=True)
            continue
        manifest = refreshed(verified)
        if manifest is not None and manifest != verified.manifest:
            write_atomically(manifest_path(prefix), [manifest.dump()])
        file, seconds = verified.file, max(time.monotonic() - began, 1e-9)
        size = file.num_tokens * file.dtype.itemsize
        said = "digests, ids and ends agree" if manifest else "no manifest: structure and ids alone"
        console.print(
            f"{prefix}: {file.num_documents:,} documents, {file.num_tokens:,} tokens: {said} "
            f"({size / seconds / 1e9:.2f} GB/s)",
            highlight=False,
            soft_wrap=True,
        )
    if bad:
        raise typer.Exit(DAMAGED)


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
