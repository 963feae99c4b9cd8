"""Command: the mean of several checkpoints of one model, in any formats, written in any format with a certificate."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checkpoints_tools.convert import DtypeChoice, FormatChoice
from checkpoints_tools.exits import errors_said

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from rich.console import Console

    from checkpoints_tools.average import Average
    from checkpoints_tools.conversion import Request
    from checkpoints_tools.opened import Opened

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def command(  # noqa: PLR0913 - typer reads the options from the parameters
    sources: Annotated[
        list[Path],
        typer.Argument(help="Checkpoints of one model.", exists=True, file_okay=False, show_default=False),
    ],
    output: Annotated[Path, typer.Option(help="Directory to make; it must not be there.", show_default=False)],
    to: Annotated[FormatChoice, typer.Option(help="Format to write.", show_default=False)],
    weights: Annotated[
        str | None, typer.Option(help="How much each counts, with commas between: 1,2,5. Only ratios matter.")
    ] = None,
    dtype: Annotated[DtypeChoice | None, typer.Option(help="Of the result; the checkpoints' if not given.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file: 5GB, 500MB …")] = "5GB",
    hf_config: Annotated[
        Path | None,
        typer.Option(help="Folder with the config.json of a checkpoint without its settings.", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads; the result does not depend on it.")] = (
        len(os.sched_getaffinity(0))
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a mean that did not end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written where.")] = False,
) -> None:
    """Write the mean of checkpoints' weights, summed in fp64, read it back, and certify it in conversion.json.

    Tokenizer and settings are those of the first checkpoint. Optimizer state is left out.
    """
    with errors_said():
        from rich.console import Console

        from checkpoints_tools.average import Average
        from checkpoints_tools.conversion import Request, fingerprint
        from checkpoints_tools.formats import model_in, open_any
        from checkpoints_tools.layout import Options
        from checkpoints_tools.sizes import parse_size

        checkpoints = [open_any(path, model=model_in(hf_config)) for path in sources]
        average = Average(checkpoints, None if weights is None else _shares(weights), _dtype(dtype))
        parts = [
            {"path": str(one.path.absolute()), "format": one.format, "share": share, "files": fingerprint(one)}
            for one, share in zip(checkpoints, average.shares, strict=True)
        ]
        options = Options(max_shard_bytes=parse_size(max_shard_size, "--max-shard-size"))
        request = Request(output, to.value, options, {"mean_of": parts}, workers, resume)
        if dry_run:
            from checkpoints_tools.dry_run import show

            show(Console(), average, checkpoints[0], request)
            return
        _write(Console(), average, checkpoints, request)


def _shares(text: str) -> list[float]:
    from checkpoints_tools.errors import RequestError

    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise RequestError(f"--weights {text}: write numbers with commas between them, as 1,2,5") from None


def _dtype(choice: DtypeChoice | None) -> "torch.dtype | None":
    import torch

    return None if choice is None else {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[choice]


def _write(console: "Console", average: "Average", checkpoints: "Sequence[Opened]", request: "Request") -> None:
    import torch

    from checkpoints_tools.conversion import convert
    from checkpoints_tools.printing import plain, size_text
    from checkpoints_tools.progress import Stages

    torch.set_num_threads(1)  # the workers are the threads
    with Stages(console) as stages:
        outcome = convert(average, checkpoints[0], request, others=checkpoints[1:], progress=stages.begin)
    said = (
        f"{request.destination}: mean of {len(checkpoints)} checkpoints, {size_text(outcome.bytes)} written in "
        f"{outcome.write_seconds:.1f} s, read back and found equal in {outcome.verify_seconds:.1f} s"
    )
    console.print(plain(said), soft_wrap=True)


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
