"""A plan for people, in a terminal: what fits, where the time goes, what would be better."""

import shlex
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from megalemur.observe.report import short, table
from megalemur.plan.better import HEADROOM, Better
from megalemur.plan.job import Job
from megalemur.plan.lint import report as lint_report
from megalemur.plan.memory import StageMemory
from megalemur.plan.memory_table import moment
from megalemur.plan.search import Candidate, overrides
from megalemur.plan.whole import Plan

MEMORY_KINDS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("weights", ("parameters",), "blue"),
    ("gradients", ("gradients",), "cyan"),
    ("optimizer", ("optimizer",), "magenta"),
    ("activations", ("activations",), "green"),
    ("logits, working", ("logits", "working"), "yellow"),
    ("other", ("buffers", "slack"), "bright_black"),
)
"""Name, fields of StageMemory and terminal colour of each part of a bar."""

TIME_NAMES: dict[str, str] = {
    "matrices": "matrix products",
    "attention": "attention",
    "elementwise": "element-wise",
    "tensor_messages": "tensor-parallel messages",
    "context_messages": "context-parallel messages",
    "output_layer": "output layer and loss",
    "recompute": "recompute",
    "pipeline_messages": "pipeline messages",
    "bubble": "pipeline bubble",
    "data_parallel": "gradients and parameters",
    "optimizer": "optimizer",
    "other": "waiting for the slowest",
}

_MOST_STAGES = 8
_NOTHING_KEPT = 1e-6
_GB = 1e9


def part_bytes(stage: StageMemory, fields: Sequence[str]) -> int:
    """Sum of some fields of a stage."""
    return sum(int(getattr(stage, field)) for field in fields)


def _heading(text: str) -> Text:
    return Text(text, style="bold")


def _bar(parts: Sequence[tuple[float, str]], *, whole: float, width: int) -> Text:
    """A stacked bar of `width` cells for `whole`; what is over it is cut. Each part ends at its rounded cell."""
    bar, done, total = Text(), 0, 0.0
    for size, style in parts:
        total += size
        end = min(width, round(total / whole * width))
        bar.append("█" * (end - done), style=style)
        done = max(done, end)
    return bar.append("·" * (width - done), style="bright_black")


def shown_stages(stages: Sequence[StageMemory]) -> list[StageMemory]:
    """All stages, or of a long pipeline the first ones, the fullest and the last."""
    if len(stages) <= _MOST_STAGES:
        return list(stages)
    fullest = max(stages, key=lambda stage: stage.total)
    return sorted({*stages[: _MOST_STAGES - 3], fullest, *stages[-2:]}, key=lambda stage: stage.stage)


def _memory(plan: Plan, width: int) -> Iterator[RenderableType]:
    limit, fullest = plan.cluster.memory_bytes, plan.fullest
    share = fullest.total / limit
    if not plan.fits:
        over = (fullest.total - limit) / _GB
        verdict = f"[bold red]does not fit: {over:.1f} GB too much on stage {fullest.stage}[/]"
    elif share > 1 - HEADROOM:
        verdict = f"[bold yellow]fits, with {1 - share:.0%} left: less than the plan may be off by[/]"
    else:
        verdict = f"[bold green]fits[/], {1 - share:.0%} left on the fullest stage"
    yield f"[bold]Memory of a rank[/], of {limit / _GB:.1f} GB: {verdict}"
    shown = shown_stages(plan.memory)
    grid, cells = Table.grid(padding=(0, 1)), max(20, min(60, width - 32))
    for one in shown:
        parts = [(part_bytes(one, fields), style) for _, fields, style in MEMORY_KINDS]
        red = "red" if one.total > limit else "default"
        layers = "+".join(f"{n} x {k}" if n > 1 else f"{k}" for k, n in _runs(one.layers))
        grid.add_row(
            f"stage {one.stage}",
            _bar(parts, whole=max(limit, fullest.total), width=cells),
            Text(f"{one.total / _GB:.1f} GB", style=red),
            Text(layers, style="bright_black"),
        )
    yield grid
    if len(shown) < len(plan.memory):
        yield Text(f"{len(plan.memory) - len(shown)} stages in between are left out", style="bright_black")
    yield Text("  ").join(Text("■ ", style=style).append(name, style="default") for name, _, style in MEMORY_KINDS)
    yield Text(
        f"fullest: stage {fullest.stage} in {moment(fullest)}, {fullest.in_flight} in flight", style="bright_black"
    )


def _runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    return [(count, len(list(same))) for count, same in groupby(layers)]


def breakdown(plan: Plan) -> list[tuple[str, float]]:
    """(name, seconds) of all that takes a thousandth of the step or more, the longest first; the rest is one row."""
    parts = sorted(plan.step.breakdown.items(), key=lambda part: -part[1])
    least = plan.step.seconds / 1000
    rows = [(TIME_NAMES.get(kind, kind), seconds) for kind, seconds in parts if seconds >= least]
    rest = sum(seconds for _, seconds in parts if seconds < least)
    return [*rows, ("everything else", rest)] if rest > 0 else rows


def seconds_text(seconds: float) -> str:
    """Seconds with the digits that mean something."""
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _time(plan: Plan, width: int) -> Iterator[RenderableType]:
    step, rows = plan.step, breakdown(plan)
    yield f"[bold]Time of a step[/]: {seconds_text(step.seconds)} ({_critical(plan)})"
    grid, cells = Table.grid(padding=(0, 1)), max(15, min(60, width - 48))
    for name, seconds in rows:
        share = Text(f"{seconds / step.seconds:.1%}", justify="right")
        bar = _bar([(seconds, "blue")], whole=rows[0][1], width=cells)
        grid.add_row(name, bar, Text(seconds_text(seconds), justify="right"), share)
    yield grid


def _critical(plan: Plan) -> str:
    return (
        "one stage" if plan.job.pipeline == 1 else f"as stage {plan.step.critical_stage} sees it, which has most to do"
    )


def facts(plan: Plan) -> list[tuple[str, str]]:
    """What the plan comes to, as names and values."""
    step, job, cost = plan.step, plan.job, plan.checkpoint
    return [
        ("model", f"{short(plan.config.model.parameters)} parameters, {plan.config.model.num_layers} layers"),
        ("layout", layout_text(job)),
        ("batch", f"{job.global_batch_size:,} x {job.sequence_length:,} tokens, {job.micro_batches:,} micro-batches"),
        ("cluster", f"{job.world_size:,} x {plan.cluster.gpu} ({plan.cluster.name})"),
        ("step", seconds_text(step.seconds)),
        ("tokens/s a GPU", f"{step.tokens_per_second_per_gpu:,.0f}"),
        ("MFU", f"{step.mfu_full_attention:.1%} full attention, {step.mfu_causal_attention:.1%} causal"),
        ("tokens a day", short(plan.tokens_per_day)),
        (
            "to the end",
            f"{_until_the_end(plan)}, {short(plan.tokens)} tokens",
        ),
        ("goodput", _goodput(plan)),
        ("checkpoint", f"{cost.whole / _GB:,.4g} GB, {seconds_text(cost.whole_seconds)} to the disk; {_saved(plan)}"),
    ]


def _until_the_end(plan: Plan) -> str:
    if plan.saves.kept < _NOTHING_KEPT:
        return "never: failures come faster than saves"
    return f"{days_text(plan.budget.days)}, {_hours(plan.budget.gpu_hours)} GPU hours"


def days_text(days: float) -> str:
    """A length of time in the unit that suits it."""
    for size, unit in ((1.0, "days"), (24.0, "hours"), (1440.0, "minutes")):
        if days * size >= 1:
            return f"{days * size:.3g} {unit}"
    return f"{days * 86400:.3g} seconds"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _goodput(plan: Plan) -> str:
    saves = plan.saves
    hours = saves.reliability.between_failures / 3600
    now = f"every {saves.every:,} steps" if saves.every else "at the end alone"
    text = f"{saves.kept:.2%} with saves {now}, a failure every {hours:,.0f} hours"
    if saves.best_every is not None and saves.best_every != saves.every:
        text += f"; best: every {saves.best_every:,} steps, {saves.best_kept:.2%}"
    return text


def _saved(plan: Plan) -> str:
    stopped = seconds_text(plan.saves.reliability.save)
    return f"training stands still for {stopped} a save"


def layout_text(job: Job) -> str:
    """TP 4 x PP 8 x DP 2, and what is not usual."""
    sizes = [("TP", job.tensor), ("PP", job.pipeline), ("CP", job.context), ("DP", job.data)]
    parts = [" x ".join(f"{name} {size}" for name, size in sizes if size > 1 or name != "CP")]
    if job.chunks > 1:
        parts.append(f"{job.chunks} chunks")
    parts.append(f"micro-batch {job.micro_batch_size}")
    outer = {sum(stage) for stage in job.layers}
    if len(outer) > 1:
        parts.append(f"{sum(job.layers[0])} and {sum(job.layers[-1])} layers at the ends")
    parts.append(recompute_text(job))
    return ", ".join(parts)


def recompute_text(job: Job) -> str:
    """How much is computed twice."""
    if job.recompute == "selective":
        return f"recompute of {', '.join(job.recompute_modules)}"
    if job.recompute == "full":
        count = f" of {job.recompute_layers} layers a chunk" if job.recompute_method == "block" else ""
        return f"full recompute{count}"
    return "no recompute"


def _difference(share: float) -> str:
    return "same" if abs(share) < 0.0005 else f"{share:+.1%}"


def _layouts(candidates: Sequence[Candidate], limit: int, against: float | None) -> Table:
    grid = Table(box=None, padding=(0, 1), header_style="bright_black")
    for name in ("step", "vs now", "GB", "of card"):
        if name != "vs now" or against is not None:
            grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("layout")
    for one in candidates:
        relative = [] if against is None else [_difference(one.seconds / against - 1)]
        sizes = (f"{one.peak_bytes / _GB:.1f}", f"{one.peak_bytes / limit:.0%}")
        grid.add_row(seconds_text(one.seconds), *relative, *sizes, layout_text(one.job))
    return grid


def nothing_found(better: Better) -> str:
    """Why a search has no answer, and what to do."""
    if not better.found.tried:
        return (
            f"no layout of {better.gpus:,} processes: tensor x pipeline x context x data cannot come to that with so "
            "many heads and layers and data.global_batch_size; take another number of GPUs or another batch"
        )
    return f"none fits {better.cluster.memory_bytes / _GB:.1f} GB: take more GPUs or larger ones"


def print_better(better: Better, console: Console, *, now: float | None, whole: bool) -> None:
    """Print the search's answer.

    Args:
        better: what was found.
        console: where to.
        now: seconds of a step as the run file has it, to compare with; None: on another number of GPUs.
        whole: twenty layouts and the Pareto front; False: the best three.
    """
    found, limit, best = better.found, better.cluster.memory_bytes, better.best
    count = f"{better.gpus:,} GPU{'s' * (better.gpus != 1)}"
    title = f"[bold]Layouts on {count}[/]: {found.tried:,} looked at, {len(found.candidates):,} fit"
    console.print(f"{title} with {HEADROOM:.0%} of {better.cluster.name} to spare", highlight=False)
    if best is None:
        console.print(Text(nothing_found(better), style="bold red"))
        return
    console.print(_layouts(better.distinct(10 if whole else 3), limit, now), highlight=False)
    if whole:
        console.print()
        console.print(_heading("Pareto front: nothing else is both faster and smaller"))
        console.print(_layouts(better.front, limit, now), highlight=False)
    console.print()
    console.print(_heading("The fastest, to write behind the run file:"))
    # one line, however long: a line that rich breaks cannot be pasted
    console.print(shlex.join(overrides(best.job)), highlight=False, markup=False, soft_wrap=True)


def print_plan(plan: Plan, console: Console) -> None:
    """Facts, memory and time."""
    console.print(table(f"Plan of {plan.config.run.name}", facts(plan)))
    console.print()
    console.print(
        lint_report.table(plan.findings) if plan.findings else "lint: nothing to say against it", highlight=False
    )
    for part in (_memory, _time):
        console.print()
        for line in part(plan, console.width):
            console.print(line, highlight=False)
    console.print()
    assumed = plan.assumptions
    console.print(
        escape(
            f"assumed (--cluster, --failures, --disk, --restart): {plan.cluster.name}, "
            f"{assumed.failures_per_gpu_year:.2g} failures a GPU and year, "
            f"{assumed.disk_bytes_per_second / _GB:g} GB/s to the file system, "
            f"{assumed.restart_seconds:g} s from a failure until training goes on"
        ),
        style="bright_black",
        highlight=False,
    )
