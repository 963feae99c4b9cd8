"""Command: a checkpoint in one format to the same checkpoint in another, with a certificate."""

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checkpoints_tools.exits import errors_said

if TYPE_CHECKING:
    from rich.console import Console

    from checkpoints_tools.conversion import Outcome, Request
    from checkpoints_tools.opened import Opened, Weights

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class FormatChoice(str, Enum):
    """--to."""

    hf = "hf"
    megalemur = "megalemur"
    megatron = "megatron"
    megatron_legacy = "megatron-legacy"


class DtypeChoice(str, Enum):
    """--dtype."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@app.command()
def command(  # noqa: PLR0913 - typer reads the options from the parameters
    source: Annotated[Path, typer.Argument(help="Directory of a checkpoint; its format is recognised.")],
    destination: Annotated[Path, typer.Argument(help="Directory to make; it must not be there.")],
    to: Annotated[FormatChoice, typer.Option(help="Format to write.")],
    dtype: Annotated[DtypeChoice | None, typer.Option(help="Of the weights; as they are if not given.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file: 5GB, 500MB …")] = "5GB",
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of the embedding; fewer only where padding goes.")
    ] = None,
    add_tokens: Annotated[
        str | None, typer.Option(help="Special tokens to add, with commas between them, or lemur-chat.")
    ] = None,
    fill: Annotated[str, typer.Option(help="New rows: mean, zero, or a safetensors file with them.")] = "mean",
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with the tokenizer to put beside the weights.")] = None,
    hf_config: Annotated[
        Path | None, typer.Option(help="Folder with the config.json of a source that does not say what it is.")
    ] = None,
    tensor: Annotated[int, typer.Option(min=1, help="megatron-legacy: tensor-parallel ranks.")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="megatron-legacy: pipeline stages.")] = 1,
    chunks: Annotated[int, typer.Option(min=1, help="megatron-legacy: virtual chunks of a stage.")] = 1,
    transformer_engine: Annotated[
        bool, typer.Option("--transformer-engine/--local-names", help="Megatron: whose layers the names are of.")
    ] = False,
    pad_vocab_to: Annotated[
        int, typer.Option(min=1, help="Megatron: a rank's rows of the embedding are a multiple of this.")
    ] = 128,
    workers: Annotated[int, typer.Option(min=1, help="Threads; the result does not depend on it.")] = (
        len(os.sched_getaffinity(0))
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a conversion that did not end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written where.")] = False,
) -> None:
    """Convert a checkpoint, read back what was written, and certify in conversion.json that nothing has changed."""
    with errors_said():
        from rich.console import Console

        from checkpoints_tools.conversion import Request
        from checkpoints_tools.formats import model_in, open_any
        from checkpoints_tools.layout import Options
        from checkpoints_tools.sizes import parse_size
        from checkpoints_tools.vocabulary import Wish, change

        console = Console()
        opened = open_any(source, model=model_in(hf_config))
        wish = Wish(vocab_size, add_tokens, fill, tokenizer)
        weights, carried, changes = change(opened, opened, wish)
        weights, changes = _cast(weights, dtype, changes)
        options = Options(
            max_shard_bytes=parse_size(max_shard_size, "--max-shard-size"),
            tensor=tensor,
            pipeline=pipeline,
            chunks=chunks,
            transformer_engine=transformer_engine,
            pad_vocab_to=pad_vocab_to,
        )
        request = Request(destination, to.value, options, changes, workers, resume)
        if dry_run:
            from checkpoints_tools.dry_run import show

            show(console, weights, carried, request)
            return
        _convert(console, weights, carried, request)


def _cast(
    weights: "Weights", dtype: DtypeChoice | None, changes: dict[str, object]
) -> "tuple[Weights, dict[str, object]]":
    if dtype is None:
        return weights, changes
    import torch

    from checkpoints_tools.changes import Cast

    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype.value]
    return Cast(weights, wanted), {**changes, "dtype": dtype.value}


def _convert(console: "Console", weights: "Weights", source: "Opened", request: "Request") -> None:
    import torch

    from checkpoints_tools.conversion import convert
    from checkpoints_tools.progress import Stages

    torch.set_num_threads(1)  # the workers are the threads
    for note in source.notes:
        console.print(f"note: {note}", highlight=False)
    with Stages(console) as stages:
        outcome = convert(weights, source, request, progress=stages.begin)
    if outcome.left_out:
        kinds = ", ".join(outcome.left_out)
        console.print(f"note: the optimizer's state ({kinds}) was not taken along", highlight=False)
    console.print(_said(outcome, request), highlight=False, soft_wrap=True)


def _said(outcome: "Outcome", request: "Request") -> str:
    from rich.filesize import decimal

    def rate(seconds: float) -> str:
        return f"{seconds:.1f} s ({decimal(int(outcome.bytes / max(seconds, 1e-9)))}/s)"

    return (
        f"{request.destination}: {decimal(outcome.bytes)} written in {rate(outcome.write_seconds)}, read back and "
        f"found equal in {rate(outcome.verify_seconds)}; conversion.json says so"
    )


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
