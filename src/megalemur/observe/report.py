"""Small tables for people: what a run is going to do, and what it did."""

from collections.abc import Iterable
from datetime import timedelta
from itertools import groupby
from pathlib import Path

from rich.table import Table

from megalemur.config.layers import stage_layers
from megalemur.config.run import RunConfig
from megalemur.config.state_bytes import share_bytes
from megalemur.observe.meter import Record
from megalemur.observe.throughput import flops_per_token

_SCALES = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K"))


def short(number: float) -> str:
    """68_976_648_192 as `68.98 B`."""
    for scale, unit in _SCALES:
        if abs(number) >= scale:
            return f"{number / scale:.4g}{unit}"
    return f"{number:g}"


def table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, without a frame. Text is printed as it is, not read as markup."""
    result = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in rows:
        result.add_row(_plain(name), _plain(value))
    return result


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def banner(config: RunConfig) -> Table:
    """What follows from a run file: model, layout, batch and length of the run."""
    return table(f"Run {config.run.name}", facts(config))


def facts(config: RunConfig) -> list[tuple[str, str]]:
    """The rows of the banner."""
    model, parallel, data = config.model, config.parallel, config.data
    flops = flops_per_token(model, data.sequence_length)
    padded = parallel.padded_vocab(model.vocab_size)
    name = f"{model.preset}: " if model.preset else ""
    return [
        ("model", f"{name}{model.num_layers} layers, hidden {model.hidden_size}"),
        ("parameters", f"{model.parameters:,} ({short(model.parameters)})"),
        ("layout", _layout(config)),
        ("processes", f"{parallel.world_size}"),
        ("layers a stage", _layers(config)),
        ("vocabulary", f"{model.vocab_size:,}, padded to {padded:,}"),
        (
            "samples a step",
            f"{data.global_batch_size:,} = {parallel.data} replicas x {config.micro_batches} micro-batches "
            f"x {data.micro_batch_size}",
        ),
        ("tokens a step", f"{config.tokens_per_step:,} ({data.sequence_length:,} a sample)"),
        ("steps", f"{config.run.steps:,}" + (f", pausing at {config.last_step:,}" if config.run.stop_at else "")),
        ("tokens in all", short(config.run.steps * config.tokens_per_step)),
        (
            "FLOPs a token",
            f"{short(flops.full_attention)} full attention, {short(flops.causal_attention)} causal, no recompute",
        ),
        ("saves", _saves(config)),
    ]


def _saves(config: RunConfig) -> str:
    """How training is held up by a save, and what that costs."""
    if not config.checkpoint.asynchronous:
        return "training stands still until each is on the disk"
    share = share_bytes(config.model, config.parallel)
    return f"in the background, from a copy of {share:,} bytes ({share / 2**30:.3g} GiB) of host memory a process"


def _layout(config: RunConfig) -> str:
    parallel = config.parallel
    parts = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}", f"data {parallel.data}"]
    if parallel.context > 1:
        parts.insert(2, f"context {parallel.context}")
    extras = [
        name
        for name, on in (
            ("sequence parallel", parallel.sequence_parallel),
            (f"{parallel.chunks} chunks a stage", parallel.chunks > 1),
            ("distributed optimizer", parallel.distributed_optimizer),
        )
        if on
    ]
    return ", ".join([" x ".join(parts), *extras])


def _layers(config: RunConfig) -> str:
    """`8 x 10`, or `9 + 6 x 10 + 11` where stages differ."""
    runs = [(count, len(list(same))) for count, same in groupby(stage_layers(config.model.num_layers, config.parallel))]
    return " + ".join(f"{times} x {count}" if times > 1 else f"{count}" for count, times in runs)


def ending(record: Record, *, seconds: float, directory: Path) -> Table:
    """The last record of a run, how long the run took, and where its metrics lie."""
    rows = [
        ("step", f"{record['step']:,}"),
        ("loss", f"{float(record['loss']):.4f}"),
        *((name, f"{float(record[name]):.4f}") for name in record if name.startswith("validation/")),
        ("tokens", f"{record['tokens']:,}"),
        ("tokens/s", f"{float(record['tokens_per_second']):,.0f}"),
        ("skipped steps", f"{record['skipped_steps']}"),
        ("time", f"{timedelta(seconds=round(seconds))}"),
        ("metrics", f"{directory}"),
    ]
    return table("Last record", rows)
