"""Command: text files to PREFIX.bin, PREFIX.idx and PREFIX.manifest.json."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from data_prep.documents import input_files, read_documents
from data_prep.encoder import Encoder
from data_prep.indexing import build_index
from megalemur.data.errors import DataError
from megalemur.data.indexed import idx_path

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def command(
    inputs: Annotated[
        list[str],
        typer.Option("--input", help="File, directory or quoted glob; repeatable. .jsonl: one document a line."),
    ],
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece model file.")],
    output: Annotated[Path, typer.Option(help="Prefix of the files to write.")],
    text_key: Annotated[str, typer.Option(help="Key of the text in JSON lines.")] = "text",
    append_eos: Annotated[bool, typer.Option(help="End every document with EOS.")] = True,
    prepend_bos: Annotated[bool, typer.Option("--prepend-bos", help="Begin every document with BOS.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Encoding threads; the result does not depend on it.")] = (
        os.cpu_count() or 1
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set of the same name.")] = False,
) -> None:
    """Turn text into an indexed data set, one document a JSON line or plain text file."""
    began = time.monotonic()
    try:
        if idx_path(output).exists() and not overwrite:
            raise ValueError(f"--output {output}: {idx_path(output)} is there; choose another, or add --overwrite")
        encoder = Encoder(tokenizer, prepend_bos=prepend_bos, append_eos=append_eos)
        documents = read_documents(input_files(inputs), text_key)
        manifest = build_index(documents, encoder, output, workers=workers)
    except (ValueError, DataError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    seconds = time.monotonic() - began
    typer.echo(
        f"{output}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {manifest.bin_bytes:,} bytes "
        f"({manifest.dtype}) in {seconds:.1f} s; {manifest.empty_documents:,} empty documents left out, "
        f"{manifest.unknown_tokens:,} unknown tokens"
    )


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
