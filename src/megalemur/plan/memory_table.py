"""Memory of a plan, and a dry run beside it, as tables for people."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from megalemur.config.run import RunConfig
from megalemur.plan.checkpoint_cost import checkpoint_cost
from megalemur.plan.dry_result import Collective, Compared, DryRun, Order, dry_run
from megalemur.plan.job import Job
from megalemur.plan.memory import UPDATE, StageMemory, memory_of

_GB = 10**9


def _gb(size: float) -> str:
    return f"{size / _GB:.2f}"


def _table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    for name in right:
        table.add_column(name, justify="right")
    for name in left:
        table.add_column(name)
    return table


def moment(stage: StageMemory) -> str:
    """When a stage is fullest, in words."""
    op = stage.peak_op
    if stage.peak_unit == UPDATE:
        return "the optimizer's update"
    where = f", chunk {op.chunk}" if len(stage.layers) > 1 else ""
    return f"{'backward' if op.backward else 'forward'} of micro-batch {op.micro_batch}{where}: {stage.peak_unit}"


def memory_table(stages: Iterable[StageMemory]) -> Table:
    """A row a pipeline stage, in GB on one of its ranks."""
    columns = ("stage", "parameters", "weights", "gradients", "optimizer", "activations", "logits", "working")
    table = _table("Memory of a rank (GB)", ("fullest in",), (*columns, "buffers", "slack", "total", "in flight"))
    for one in stages:
        sizes = (one.parameters, one.gradients, one.optimizer, one.activations, one.logits, one.working)
        table.add_row(
            str(one.stage),
            f"{one.parameter_count / 1e9:.3f} B",
            *map(_gb, (*sizes, one.buffers, one.slack)),
            f"[bold]{_gb(one.total)}[/]" + ("" if one.fits is not False else " [red]too much[/]"),
            str(one.in_flight),
            moment(one),
        )
    return table


def dry_run_table(found: DryRun) -> Table:
    """What the modules took, and how far the plan is off."""
    columns = ("rank", "stage", "params", "traced GB", "planned", "off", "activ. off", "TFLOP", "off", "s")
    table = _table(f"Dry run of ranks among {found.world_size}, fake tensors", (), columns)
    for one in found.ranks:
        trace, exact = one.trace, one.trace.parameter_count == one.planned.parameter_count
        table.add_row(
            str(trace.rank),
            str(trace.stage),
            f"{trace.parameter_count / 1e9:.3f} B"
            + ("" if exact else f" [red]({trace.parameter_count - one.planned.parameter_count:+,} to the plan)[/]"),
            _gb(trace.peak),
            _gb(one.planned.traced),
            f"{one.total_error:+.2%}",
            f"{one.memory_error:+.2%}",
            f"{trace.flops / 1e12:.1f}",
            f"{one.flops_error:+.2%}",
            f"{trace.seconds:.1f}",
        )
    return table


def collectives_table(one: Compared) -> Table:
    """What one rank sends and receives."""
    title = f"Collectives of rank {one.trace.rank}: a micro-batch through its chunks, and the end of a step"
    table = _table(title, ("kind", "group"), ("calls", "GB"))
    for row in one.trace.collectives:
        _add(table, row, row.group)
    for row in one.trace.messages:
        _add(table, row, f"{row.group}, in {one.trace.forwards} forward operations")
    return table


def _add(table: Table, row: Collective, group: str) -> None:
    table.add_row(str(row.calls), f"{row.bytes / _GB:.3f}", row.kind.strip("_"), group)


def print_memory(config: RunConfig, console: Console) -> None:
    """The memory of every stage, and what a checkpoint weighs. Needs no torch."""
    console.print(memory_table(memory_of(Job.of(config))))
    cost = checkpoint_cost(config, disk_bytes_per_second=_GB)
    console.print(
        f"checkpoint: {_gb(cost.whole)} GB ({_gb(cost.weights)} GB of it weights), {cost.whole_seconds:.0f} s "
        f"to a file system that takes 1 GB/s; {_gb(cost.rank)} GB from a rank of the fullest stage"
    )


def print_dry_run(config: RunConfig, console: Console, ranks: Sequence[int]) -> None:
    """Trace the chosen ranks and print them beside the plan.

    Raises:
        ValueError: the run file asks for modules that are not installed.
    """
    found = dry_run(Order(config), ranks)
    console.print(dry_run_table(found))
    for one in (found.ranks[0], found.ranks[-1])[: len(found.ranks)]:
        console.print(collectives_table(one))
