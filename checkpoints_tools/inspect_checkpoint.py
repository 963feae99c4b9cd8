"""Command: what a checkpoint of any format holds: model, layout, tensors, statistics, and what differs from another."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checkpoints_tools.exits import errors_said

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from checkpoints_tools.compare import Comparison
    from checkpoints_tools.opened import Opened
    from checkpoints_tools.progress import Stages
    from checkpoints_tools.regions import Key
    from checkpoints_tools.tensor_statistics import Statistics

_TREE_WIDTH = 200

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's directory.", exists=True, show_default=False)],
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Read every tensor: norm, mean, range, NaNs and infinities.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="Another checkpoint: say what differs, tensor by tensor.", exists=True)
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Show every layer, and every tensor that differs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    hf_config: Annotated[
        Path | None,
        typer.Option(help="Folder with the config.json of a checkpoint without its settings.", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read.")] = len(os.sched_getaffinity(0)),
) -> None:
    """Show what a checkpoint holds; without --statistics and --against, no tensor is read.

    Exit code 13: it is damaged. A difference found by --against is no error; verify.py has exit codes for it.
    """
    with errors_said():
        import torch
        from rich.console import Console

        from checkpoints_tools.formats import model_in, open_any
        from checkpoints_tools.progress import Stages

        torch.set_num_threads(1)  # the workers are the threads
        model = model_in(hf_config)
        opened = open_any(checkpoint, model=model)
        other = None if against is None else open_any(against, model=model)
        with Stages(Console(stderr=True)) as stages:
            numbers = _statistics(opened, workers, stages) if statistics else None
            comparison = None if other is None else _compare(opened, other, workers, stages)
        if as_json:
            _print_json(opened, numbers, comparison)
        else:
            _show(Console(highlight=False), opened, (numbers, comparison), show_all=show_all)


def _statistics(opened: "Opened", workers: int, stages: "Stages") -> "Mapping[Key, Statistics]":
    from checkpoints_tools.description import tensors_of
    from checkpoints_tools.tensor_statistics import all_statistics

    advance = stages.begin("reading", sum(one.bytes for one in tensors_of(opened)))
    return all_statistics(opened, workers=workers, progress=advance)


def _compare(opened: "Opened", other: "Opened", workers: int, stages: "Stages") -> "Comparison":
    from checkpoints_tools.compare import bytes_to_compare, compare

    advance = stages.begin("comparing", bytes_to_compare(opened, other))
    return compare(opened, other, workers=workers, progress=advance)


def _print_json(opened: "Opened", numbers: "Mapping[Key, Statistics] | None", comparison: "Comparison | None") -> None:
    from checkpoints_tools.description import as_json
    from megalemur.config.strict_json import readable_json

    typer.echo(readable_json(as_json(opened, numbers, comparison)).decode(), nl=False)


def _show(
    console: "Console",
    opened: "Opened",
    found: "tuple[Mapping[Key, Statistics] | None, Comparison | None]",
    *,
    show_all: bool,
) -> None:
    from rich.console import Console

    from checkpoints_tools.comparison_tables import show_comparison, verdict
    from checkpoints_tools.description import checkpoint_facts, model_facts, tensors_of
    from checkpoints_tools.printing import facts_table, plain
    from checkpoints_tools.tensor_tree import tensor_tree

    numbers, comparison = found
    console.print(facts_table(str(opened.path), checkpoint_facts(opened)))
    console.print(facts_table("Model", model_facts(opened.model)))
    for note in opened.notes:
        console.print(plain(f"note: {note}", "yellow"), soft_wrap=True)
    # a narrow terminal wraps a long line by itself, where rich would cut it
    wide = Console(highlight=False, width=max(console.width, _TREE_WIDTH))
    wide.print(tensor_tree("Tensors", tensors_of(opened), numbers, unfold=show_all))
    if comparison is not None:
        console.print()
        show_comparison(console, comparison, 0.0, every=show_all)
        said = verdict(comparison, 0.0)
        console.print(plain(f"A (this one) and B are {said}", "green" if comparison.equal() else "red"), soft_wrap=True)


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
