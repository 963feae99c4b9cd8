"""What `megalemur plan` is asked, and how it answers: terminal, JSON, page, run file."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson
from rich.console import Console

from megalemur.config.load import ConfigError, load_run
from megalemur.plan.better import Better, look_for_better, write_winner
from megalemur.plan.cluster import load_cluster
from megalemur.plan.document import document, plan_schema
from megalemur.plan.dry_result import chosen_ranks
from megalemur.plan.memory_table import print_dry_run
from megalemur.plan.terminal import print_better, print_plan
from megalemur.plan.whole import Assumptions, Plan, make_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The command line."""

    run_file: Path
    overrides: tuple[str, ...] = ()
    cluster: str = "h100_sxm"
    search: bool = False
    gpus: int | None = None
    """Of the search; None: as in the run file."""
    write: Path | None = None
    """Where the fastest layout's run file goes."""
    html: Path | None = None
    as_json: bool = False
    failures_per_gpu_year: float
    disk_bytes_per_second: float
    restart_seconds: float
    dry_run: bool = False
    ranks: str | None = None
    all_classes: bool = False


class Answer(NamedTuple):
    """What an exit code says."""

    wrong: bool
    """Lint found an error."""
    fits: bool
    """The run fits, or of a search any layout."""


def answer(question: Question) -> Answer:
    """Plan, write what is asked for, and print: whoever cuts the output short has the files.

    Raises:
        ConfigError: run file, overrides, cluster or a file to write cannot be used.
        ValueError: options that exclude each other, or a cluster that cannot run it.
    """
    _check(question)
    config = load_run(question.run_file, question.overrides)
    ranks = chosen_ranks(config.parallel, question.ranks, all_classes=question.all_classes)
    plan = make_plan(
        config,
        load_cluster(question.cluster, question.run_file),
        Assumptions(
            failures_per_gpu_year=question.failures_per_gpu_year,
            disk_bytes_per_second=question.disk_bytes_per_second,
            restart_seconds=question.restart_seconds,
        ),
    )
    better = look_for_better(config, plan.cluster, question.gpus)
    if question.write is not None and better.best is not None:
        write_winner(better, question.run_file, question.overrides, question.write)
    if question.html is not None:
        _write_page(question.html, plan, better)
    if question.as_json:
        sys.stdout.write(orjson.dumps(document(plan, better).model_dump(), option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        _print(question, plan, better)
    if question.dry_run:
        print_dry_run(config, Console(), ranks)
    return Answer(plan.wrong, better.best is not None if question.search else plan.fits)


def _check(question: Question) -> None:
    for name, needs_search in (("--gpus", question.gpus), ("--write", question.write)):
        if needs_search is not None and not question.search:
            raise ValueError(f"{name} belongs to a search; write --search too")
    for name, value, least in (
        ("--failures", question.failures_per_gpu_year, 0.0),
        ("--disk", question.disk_bytes_per_second / 1e9, sys.float_info.min),
        ("--restart", question.restart_seconds, 0.0),
    ):
        if not least <= value < math.inf:
            raise ValueError(f"{name} {value:g}: give a finite number{', more than 0' if least else ', 0 or more'}")
    if question.as_json and question.dry_run:
        raise ValueError("--json and --dry-run exclude each other; leave one of them out")
    if not question.dry_run and (question.ranks is not None or question.all_classes):
        raise ValueError("--ranks and --all-classes belong to a dry run; write --dry-run too")
    if question.ranks is not None and question.all_classes:
        raise ValueError("--ranks and --all-classes exclude each other; leave one of them out")


def _print(question: Question, plan: Plan, better: Better) -> None:
    console = Console()
    same = better.gpus == plan.job.world_size
    if not question.search:
        print_plan(plan, console)
        console.print()
    elif same:
        console.print(f"as the run file has it: {plan.step.seconds:.2f} s a step", highlight=False)
    print_better(better, console, now=plan.step.seconds if same else None, whole=question.search)
    for target in (question.write if better.best is not None else None, question.html):
        if target is not None:
            console.print(f"written: {target}", highlight=False, markup=False)


def _write_page(target: Path, plan: Plan, better: Better) -> None:
    from megalemur.plan.page import page  # plotly takes half a second to import

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(plan, better), encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(target), [f"cannot be written: {error.strerror or error}"]) from None


def print_schema() -> None:
    """Print the JSON schema of what --json prints."""
    sys.stdout.write(orjson.dumps(plan_schema(), option=orjson.OPT_INDENT_2).decode() + "\n")
