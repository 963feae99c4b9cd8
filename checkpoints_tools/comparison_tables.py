"""A comparison of two checkpoints as people read it: one line where they are equal, tables of what differs."""

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from checkpoints_tools.compare import Comparison, TensorComparison
from checkpoints_tools.logit_difference import LogitDifference
from checkpoints_tools.printing import counted, dtype_text, facts_table, plain, shape_text, visible
from checkpoints_tools.regions import WEIGHT, Key

SHOWN = 40
"""Rows of a table unless all are asked for."""


def show_comparison(console: Console, found: Comparison, tolerance: float, *, every: bool = False) -> None:
    """Print what differs, and what was not compared.

    Args:
        console: where to.
        found: the comparison.
        tolerance: differences up to it are none; 0 asks for equal bits.
        every: whether long tables are printed whole.
    """
    if found.settings:
        console.print(_settings(found))
    for which, keys in zip(("A", "B"), found.alone, strict=True):
        if keys:
            named = _some([_name(key) for key in keys])
            console.print(plain(f"only {which} has {counted(len(keys), 'tensor')}: {named}"), soft_wrap=True)
    beyond = found.beyond(tolerance)
    for one in beyond:
        if not one.same_shape:
            a, b = map(shape_text, one.shapes)
            console.print(plain(f"{_name(one.key)} is {a} in A and {b} in B"), soft_wrap=True)
    unequal = [one for one in beyond if one.same_shape]
    if unequal:
        shown = unequal if every else unequal[:SHOWN]
        console.print(_tensors(shown))
        if len(shown) < len(unequal):
            console.print(plain(f"and {len(unequal) - len(shown):,} more; --all shows them"))
    for which, kinds in zip(("A", "B"), found.left_out, strict=True):
        if kinds:
            console.print(plain(f"not compared, for only {which} has it: {', '.join(kinds)}", "yellow"))
    casts = sorted({(*map(dtype_text, one.dtypes), dtype_text(one.compared_as)) for one in found.cast})
    for a, b, common in casts:
        tensors = [one for one in found.cast if (dtype_text(one.dtypes[0]), dtype_text(one.dtypes[1])) == (a, b)]
        console.print(
            plain(f"{counted(len(tensors), 'tensor')}: {a} in A and {b} in B, values compared as {common}", "yellow")
        )


def verdict(found: Comparison, tolerance: float) -> str:
    """In one line."""
    beyond, same = found.beyond(tolerance), len(found.tensors)
    if found.equal(tolerance):
        inexact = [one for one in found.tensors if one.differing]
        if inexact:
            worst = max(one.max_difference for one in inexact)
            some = f"{counted(len(inexact), 'tensor')} of {same:,}"
            return f"equal within {tolerance:g}: {some} differ by {worst:.3g} at most"
        what = "values, after the cast" if found.cast else "bits"
        return f"equal: same settings, {counted(same, 'tensor')} with the same {what}"
    parts = [(counted(len(found.settings), "setting"), found.settings), ("tensors that only one has", any(found.alone))]
    parts += [(f"{counted(len(beyond), 'tensor')} of {same:,}", beyond)]
    return "different: " + ", ".join(text for text, there in parts if there)


def _settings(found: Comparison) -> Table:
    table = Table(title="Settings that differ", title_justify="left", title_style="bold")
    for name in ("setting", "A", "B"):
        table.add_column(name, overflow="fold")
    for one in found.settings:
        table.add_row(one.name, *(Text(visible(f"{value}")) for value in (one.a, one.b)))
    return table


def _tensors(beyond: Sequence[TensorComparison]) -> Table:
    table = Table(title="Tensors that differ", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("tensor", overflow="fold")
    for name in ("differ", "largest", "RMS"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in beyond:
        numbers = map(number_text, (one.max_difference, one.rms_difference))
        table.add_row(_name(one.key), _share(one.differing, one.elements), *numbers)
    return table


def _share(differing: int, elements: int) -> str:
    """Of the elements that differ; few are counted."""
    share = differing / elements
    return f"{differing:,}" if share < 1e-3 else "all" if share == 1 else f"{min(share, 0.9999):.2%}"


def number_text(value: float) -> str:
    """Four digits; what is no number says so."""
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _name(key: Key) -> str:
    return key.name if key.kind == WEIGHT else f"{key.name} ({key.kind})"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def logits_table(found: LogitDifference, origin: str, bounds: tuple[float | None, float | None]) -> Table:
    """What running both came to.

    Args:
        found: the difference.
        origin: of the prompts.
        bounds: of the largest difference and of the largest KL divergence; None: not bounded.
    """

    def bounded(value: float, unit: str, bound: float | None) -> str:
        said = f"{number_text(value)}{unit}"
        if bound is None:
            return said
        return f"{said}, {'within' if value <= bound else 'BEYOND'} the bound {bound:g}"

    return facts_table(
        "Logits in fp32",
        [
            ("prompts", origin),
            ("compared", f"{found.vocabulary:,} logits of each of {found.tokens:,} tokens"),
            ("largest logit of A", number_text(found.largest_logit)),
            ("largest difference", bounded(found.max_difference, "", bounds[0])),
            ("mean difference", number_text(found.mean_difference)),
            ("largest KL(A || B)", bounded(found.max_kl, " nats", bounds[1])),
            ("mean KL(A || B)", f"{number_text(found.mean_kl)} nats"),
            ("same most likely token", f"{found.same_choice:,} of {found.tokens:,}"),
        ],
    )
