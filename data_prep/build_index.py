"""Command: text files to PREFIX.bin, PREFIX.idx and PREFIX.manifest.json."""

import os
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from data_prep.build import Request, build, complete_already
from data_prep.exits import errors_said
from data_prep.join import part_prefix
from megalemur.data.indexed import idx_path
from megalemur.data.manifest import Manifest

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class EngineChoice(str, Enum):
    """--engine."""

    auto = "auto"
    fast = "fast"
    reference = "reference"


class FormatChoice(str, Enum):
    """--format."""

    auto = "auto"
    jsonl = "jsonl"
    text = "text"
    parquet = "parquet"
    arrow = "arrow"


@app.command()
def command(  # noqa: PLR0913 - typer reads the options from the parameters
    inputs: Annotated[
        list[str],
        typer.Option("--input", help="File, directory, quoted glob, URL (s3://, gs://, hf:// …) or -; repeatable."),
    ],
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece .model, tokenizer.json, or a directory with one.")],
    output: Annotated[Path, typer.Option(help="Prefix of the files to write.")],
    text_key: Annotated[str, typer.Option(help="Key or column of the text.")] = "text",
    form: Annotated[
        FormatChoice,
        typer.Option("--format", help="auto: by ending; .jsonl, .ndjson, .parquet, .arrow, else one text a file."),
    ] = FormatChoice.auto,
    engine: Annotated[
        EngineChoice,
        typer.Option(help="auto: the fast engine where it gives the reference's ids on this input."),
    ] = EngineChoice.auto,
    append_eos: Annotated[bool, typer.Option(help="End every document with EOS.")] = True,
    prepend_bos: Annotated[bool, typer.Option("--prepend-bos", help="Begin every document with BOS.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Encoding processes; the result does not depend on it.")] = (
        len(os.sched_getaffinity(0))
    ),
    skip_bad: Annotated[
        int, typer.Option(min=0, metavar="N", help="Leave out up to N documents that cannot be read, and list them.")
    ] = 0,
    shuffle: Annotated[
        int | None, typer.Option(min=0, metavar="SEED", help="Put the documents into a seeded order.")
    ] = None,
    part: Annotated[int | None, typer.Option(min=0, metavar="I", help="Build part I, 0 to N-1, of --parts N.")] = None,
    parts: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Parts, one a machine; merge_index.py puts them together.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML page about the data.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set of the same name.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an interrupted build left.")] = False,
) -> None:
    """Turn text into an indexed data set: one document a JSON line, table row or text file.

    A build that was interrupted goes on where it was when the same command is given again.
    """
    began = time.monotonic()
    console = Console()
    with errors_said("finished units stay"):
        which = _part(part, parts, shuffle)
        if which is not None:
            output = part_prefix(output, *which)
        request = Request(
            inputs=inputs,
            format=None if form is FormatChoice.auto else form.value,
            text_key=text_key,
            tokenizer=tokenizer,
            engine=engine.value,
            output=output,
            prepend_bos=prepend_bos,
            append_eos=append_eos,
            workers=workers,
            skip_bad=skip_bad,
            part=which,
            shuffle=shuffle,
            restart=restart,
        )
        manifest = _complete(request, console, overwrite=overwrite)
        if report is not None:
            _report(output, report, tokenizer)
    console.print(_table(output, manifest, time.monotonic() - began))


def _complete(request: Request, console: Console, *, overwrite: bool) -> Manifest:
    """Build, unless this very command has done so, as when it was killed while it tidied up or wrote its report."""
    done = None if overwrite else complete_already(request)
    if done is not None:
        console.print(f"{request.output} is complete: this command built it before", highlight=False, soft_wrap=True)
        return done
    path = idx_path(request.output)
    if path.exists() and not overwrite:
        raise ValueError(f"--output {request.output}: {path} is there; choose another, or add --overwrite")
    return build(request, console)


def _part(part: int | None, parts: int | None, shuffle: int | None) -> tuple[int, int] | None:
    if part is None and parts is None:
        return None
    if part is None or parts is None or part >= parts:
        raise ValueError(f"--part {part} --parts {parts}: give both, with a part of 0 to N-1")
    if shuffle is not None:
        raise ValueError("--shuffle: documents are put into their order when the parts are merged; give it there")
    return part, parts


def _report(output: Path, report: Path, tokenizer: Path) -> None:
    from data_prep.report import write_report
    from data_prep.tokenizer import load_tokenizer

    write_report(output, report, load_tokenizer(tokenizer))


def _table(output: Path, manifest: Manifest, seconds: float) -> Table:
    table = Table(title=str(output), title_justify="left", title_style="bold", show_header=False, box=None)
    rows = {
        "documents": f"{manifest.documents:,}",
        "tokens": f"{manifest.tokens:,} ({manifest.dtype})",
        "bytes a token": f"{manifest.text_bytes / max(1, manifest.tokens):.2f}",
        "left out": f"{manifest.empty_documents:,} empty documents, {len(manifest.bad):,} bad ones",
        "unknown tokens": f"{manifest.unknown_tokens:,}",
        "control strings": ", ".join(f"{text} {n:,}" for text, n in manifest.control_strings.items()) or "none",
        "engine": str(manifest.origin.facts["engine"]),
        "time": f"{seconds:.1f} s ({', '.join(f'{k} {v:.1f}' for k, v in manifest.origin.seconds.items())})",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
