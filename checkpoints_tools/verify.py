"""Command: are two checkpoints of any formats the same model with the same values? Reads every byte of both."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checkpoints_tools.exits import DIFFERENT, errors_said

if TYPE_CHECKING:
    from rich.console import Console

    from checkpoints_tools.opened import Opened

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def command(  # noqa: PLR0913 - typer reads the options from the parameters
    a: Annotated[Path, typer.Argument(help="A checkpoint's directory.", exists=True, show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another's, in any format.", exists=True, show_default=False)],
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest difference of an element that counts as none; 0: equal bits.")
    ] = 0.0,
    logits: Annotated[
        bool, typer.Option("--logits", help="Run both on prompts in fp32, a layer at a time, and compare the logits.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Texts for --logits, with a line --- between two.", exists=True, dir_okay=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt; longer ones are cut.")] = 256,
    max_difference: Annotated[
        float | None, typer.Option(min=0, help="Bound of --logits: largest difference of a logit.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="Bound of --logits: largest KL divergence of a token, in nats.")
    ] = None,
    hf_config: Annotated[
        Path | None,
        typer.Option(help="Folder with the config.json of a checkpoint without its settings.", show_default=False),
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Show every tensor that differs.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and compare.")] = (
        len(os.sched_getaffinity(0))
    ),
) -> None:
    """Compare two checkpoints: settings, tensors, values and, with --logits, what they compute.

    Exit code 0: equal, and within the bounds. 3: not. 13: one is damaged. 1, 2: the command cannot be run so.

    With a bound of --logits and --tolerance inf, the logits alone decide.
    """
    with errors_said():
        from rich.console import Console

        from checkpoints_tools.errors import RequestError
        from checkpoints_tools.formats import model_in, open_any

        bounds = (max_difference, max_kl)
        if not logits and (prompts is not None or bounds != (None, None)):
            raise RequestError("--prompts, --max-difference and --max-kl are about logits; add --logits")
        console, model = Console(), model_in(hf_config)
        checkpoints = (open_any(a, model=model), open_any(b, model=model))
        same = _tensors(console, checkpoints, tolerance, workers, show_all=show_all)
        if logits:
            same = _logits(console, checkpoints, prompts, max_tokens, bounds) and same
    if not same:
        raise typer.Exit(DIFFERENT)


def _tensors(
    console: "Console", checkpoints: "tuple[Opened, Opened]", tolerance: float, workers: int, *, show_all: bool
) -> bool:
    import torch

    from checkpoints_tools.compare import bytes_to_compare, compare
    from checkpoints_tools.comparison_tables import show_comparison, verdict
    from checkpoints_tools.printing import plain, size_text
    from checkpoints_tools.progress import Stages

    threads, began = torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(1)  # the workers are the threads
    total = bytes_to_compare(*checkpoints)
    with Stages(console) as stages:
        found = compare(*checkpoints, workers=workers, progress=stages.begin("comparing", total))
    torch.set_num_threads(threads)
    show_comparison(console, found, tolerance, every=show_all)
    a, b = (f"{one.path} ({one.format})" for one in checkpoints)
    rate = total / max(time.monotonic() - began, 1e-9) / 1e9
    said = f"{a} and {b} are {verdict(found, tolerance)} ({size_text(total)} each, {rate:.2f} GB/s)"
    same = found.equal(tolerance)
    console.print(plain(said, "green" if same else "red"), soft_wrap=True)
    return same


def _logits(
    console: "Console",
    checkpoints: "tuple[Opened, Opened]",
    path: Path | None,
    max_tokens: int,
    bounds: tuple[float | None, float | None],
) -> bool:
    import math

    from checkpoints_tools.comparison_tables import logits_table
    from checkpoints_tools.forward import bytes_to_read
    from checkpoints_tools.logit_difference import compare_logits
    from checkpoints_tools.progress import Stages
    from checkpoints_tools.prompts import encode, read_prompts

    texts = None if path is None else read_prompts(path)
    encoded = encode(
        [one.small_files for one in checkpoints],
        texts,
        vocab_size=min(one.model.vocab_size for one in checkpoints),
        limit=min(max_tokens, *(one.model.max_position_embeddings for one in checkpoints)),
    )
    with Stages(console) as stages:
        advance = stages.begin("running", sum(map(bytes_to_read, checkpoints)))
        found = compare_logits(*checkpoints, encoded.ids, advance)
    console.print(logits_table(found, encoded.origin, bounds))
    return found.within(*(math.inf if bound is None else bound for bound in bounds))


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
