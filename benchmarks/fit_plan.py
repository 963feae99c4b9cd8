"""Fits the time model's constants to the published runs, and says how far its predictions are off.

    python benchmarks/fit_plan.py            # residuals of the constants that are kept, in sample, held out and blind
    python benchmarks/fit_plan.py --fit      # fits, writes src/megalemur/plan/constants.yaml
    python benchmarks/fit_plan.py --leave-out  # fits without each family and predicts it
    python benchmarks/fit_plan.py --rows FILE.csv  # errors on rows of your own, in the columns of benchmarks/published

Blackwell's one constant is fitted on the rows of blackwell.csv, with the others as they are.

The fit minimises squared logarithms of predicted over measured seconds, every family with the same weight and every
configuration of a family too, with a weak pull of each constant to a typical value: what the rows do not say stays
plausible. Needs scipy (the `fit` extra); nothing else of the project does.
"""

import argparse
import math
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.published_jobs import (
    Row,
    Trial,
    configuration_error,
    errors,
    mean_error,
    predicted,
    rows,
    trials,
    worst_error,
)
from megalemur.plan import constants as constants_module
from megalemur.plan.cluster import load_cluster
from megalemur.plan.constants import Constants, fitted
from megalemur.plan.memory import memory_of
from megalemur.plan.step_time import TimeModel

CONSTANTS = Path(constants_module.__file__).with_name("constants.yaml")
PULL = 0.1
"""Weight of a constant's distance from its typical value, in widths of its bounds."""

TYPICAL = {
    "gemm_ampere": 0.8,
    "gemm_hopper": 0.70,
    "gemm_fp8": 0.60,
    "attention": 0.6,
    "memory": 0.85,
    "links": 0.85,
    "tensor_exposed": 0.3,
    "step_gap": 0.004,
}


def bounds() -> dict[str, tuple[float, float]]:
    """The range of each constant, from its declaration."""
    found = {}
    for name, field in Constants.model_json_schema()["properties"].items():
        found[name] = (float(field["minimum"]), float(field["maximum"]))
    return found


def fit(table: list[Row], names: tuple[str, ...] = tuple(TYPICAL), others: Constants | None = None) -> Constants:
    """The constants that fit the rows best.

    Args:
        table: the rows.
        names: constants that are fitted.
        others: has the values of those that are not; None: their typical ones.
    """
    from scipy.optimize import least_squares

    ranges, held = bounds(), {**TYPICAL, "blackwell": 1.0} if others is None else others.model_dump()
    low = np.array([ranges[name][0] for name in names])
    width = np.array([ranges[name][1] for name in names]) - low
    typical = (np.array([{**TYPICAL, "blackwell": 0.8}[name] for name in names]) - low) / width
    clusters = {row.cluster: load_cluster(row.cluster) for row in table}
    in_configuration = Counter(row.configuration for row in table)
    in_family = Counter(configuration[0] for configuration in in_configuration)
    weights = [1 / math.sqrt(in_configuration[row.configuration] * in_family[row.family]) for row in table]

    def unpack(point: np.ndarray) -> Constants:
        values = low + width * np.clip(point, 0, 1)
        return Constants(**{**held, **dict(zip(names, map(float, values), strict=True))})

    def residuals(point: np.ndarray) -> np.ndarray:
        models = {name: TimeModel(cluster, unpack(point)) for name, cluster in clusters.items()}
        off = [
            weight * math.log(predicted(row, models[row.cluster]) / row.seconds)
            for row, weight in zip(table, weights, strict=True)
        ]
        return np.array([*off, *(PULL * (point - typical))])

    starts = (typical, np.full(len(names), 0.5))
    results = [least_squares(residuals, start, bounds=(0, 1), diff_step=1e-3) for start in starts]
    return unpack(min(results, key=lambda result: result.cost).x)


def leave_out(table: list[Row]) -> dict[str, dict[str, float]]:
    """Errors of each family, predicted by constants that were fitted on the others."""
    found = {}
    for family in dict.fromkeys(row.family for row in table):
        left, kept = [r for r in table if r.family == family], [r for r in table if r.family != family]
        off = errors(left, fit(kept))
        found[family] = {"mean": mean_error(off), "worst": worst_error(off)}
    return found


def show(title: str, table: list[Row], constants: Constants) -> None:
    """Prints the residual table."""
    found = errors(table, constants)
    print(
        f"\n{title}: mean {mean_error(found):.2%} (families alike), {configuration_error(found):.2%} "
        f"(configurations alike), worst {worst_error(found):.2%}"
    )
    for family, configurations in found.items():
        print(f"  {family}: {mean_error({family: configurations}):.2%}")
        for configuration, off in configurations.items():
            print(f"    {' '.join(map(str, configuration[1:])):58} {' '.join(f'{value:+.1%}' for value in off)}")


def show_order(table: list[Row], constants: Constants) -> None:
    """Prints how well the model orders the layouts of one job on the same GPUs, which is what a search needs."""
    models = {name: TimeModel(load_cluster(name), constants) for name in {row.cluster for row in table}}
    groups: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for row in table:
        both = predicted(row, models[row.cluster]), row.seconds
        groups.setdefault((row.source, row.model, row.gpus), []).append(both)
    print("\n  layouts in order: pairs that are measured as predicted; the predicted best beside the measured best")
    for (source, model, gpus), times in groups.items():
        pairs = [(a, b) for a, b in combinations(times, 2) if a[1] != b[1]]
        if len(pairs) > 1:
            right = sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in pairs) / len(pairs)
            lost = min(times)[1] / min(measured for _, measured in times) - 1
            print(f"    {source}, {model}, {gpus} GPUs: {len(times)} layouts, {right:.0%} of pairs, {lost:+.1%}")


def show_memory(table: list[Trial]) -> None:
    """Prints how often the memory model says rightly that a layout runs or is out of memory."""
    groups: dict[str, Counter[tuple[bool, bool]]] = {}
    for trial in table:
        capacity = load_cluster(trial.cluster).memory_bytes
        fits = max(stage.total for stage in memory_of(trial.job)) <= capacity
        groups.setdefault(f"{trial.model} {trial.job.recompute}", Counter())[fits, trial.ran] += 1
    print("\n  layouts that ran or were out of memory")
    for name, seen in groups.items():
        right = (seen[True, True] + seen[False, False]) / seen.total()
        wrong = f"{seen[True, False]} said to fit that did not, {seen[False, True]} the other way"
        print(f"    {name:20} {seen.total()} layouts, {right:.0%} right, {wrong}")


def write(constants: Constants, table: list[Row], left_out: dict[str, dict[str, float]]) -> None:
    """Keeps the constants and their errors."""
    found = errors(table, constants)
    values = {
        "constants": {name: float(f"{value:.4g}") for name, value in constants.model_dump().items()},
        "residuals": {
            "mean": round(mean_error(found), 4),
            "worst": round(worst_error(found), 4),
            "rows": {
                " ".join(map(str, configuration)): [round(value, 4) for value in off]
                for family in found.values()
                for configuration, off in family.items()
            },
        },
        "left_out": {family: {k: round(v, 4) for k, v in off.items()} for family, off in left_out.items()},
    }
    head = "# Written by benchmarks/fit_plan.py --fit: not edited by hand. What each constant is says constants.py.\n"
    CONSTANTS.write_text(head + yaml.safe_dump(values, sort_keys=False, width=120), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit, and write the constants")
    parser.add_argument("--leave-out", action="store_true", help="fit without each family in turn, and predict it")
    parser.add_argument("--rows", type=Path, metavar="FILE.csv", help="only say how far off other rows are predicted")
    options = parser.parse_args()
    if options.rows:
        return show(str(options.rows), rows(options.rows.resolve()), fitted())
    table = rows("published_runs.csv")
    if options.fit:
        best = fit(rows("blackwell.csv"), ("blackwell",), fit(table))
        rounded = {name: float(f"{value:.4g}") for name, value in best.model_dump().items()}
        write(Constants(**rounded), table, leave_out(table))
        fitted.cache_clear()
    constants = fitted()
    for name, value in constants.model_dump().items():
        print(f"{name:16} {value:.4g}   {bounds()[name]}")
    show("fitted", table, constants)
    if options.leave_out:
        for family, off in leave_out(table).items():
            print(f"without {family}: {off['mean']:.2%}, worst {off['worst']:.2%}")
    show("Blackwell's constant fitted", rows("blackwell.csv"), constants)
    show("held out", rows("held_out.csv"), constants)
    show("blind", rows("blind.csv"), constants)
    layouts = rows("layouts.csv")
    show("blind, layouts on A100", layouts, constants)
    show_order(layouts, constants)
    show_memory(trials("layouts_memory.csv"))


if __name__ == "__main__":
    main()
