"""The planned memory beside megatron-core's own modules on fake tensors: 40 random jobs, every stage, every operation.

    python benchmarks/plan_memory.py [--runs 40] [--seed 7]

Prints the distribution of the errors and ends with 1 where one is above 5 %. On the CPU only; takes some minutes.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.planned import all_stages, differing, random_runs

TOLERANCE = 0.05


def _row(name: str, errors: list[float]) -> str:
    ordered = sorted(map(abs, errors))
    ninth = ordered[int(0.9 * (len(ordered) - 1))]
    return f"{name:28} mean {statistics.mean(ordered):7.3%}   90 % below {ninth:7.3%}   worst {ordered[-1]:7.3%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    started, found = time.monotonic(), []
    for number, run in enumerate(random_runs(given.runs, seed=given.seed)):
        found += all_stages(run, number % 2 == 0)
    print(f"{given.runs} jobs, {len(found)} stages, {time.monotonic() - started:.0f} s")
    print(_row("activations at the peak", [one.compared.memory_error for one in found]))
    print(_row("all tensors at the peak", [one.compared.total_error for one in found]))
    problems = differing(found, TOLERANCE)
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
