"""Random schedules of saves, kills, restarts and damage: there is always a checkpoint that verifies.

python -m tests.faults.retention --trials 1000 --seed 1
"""

import argparse
import time

import hypothesis
from hypothesis import HealthCheck, given, settings

from tests.unit.checkpoint.test_retention import EVENTS, RULES, check_schedule


def run(trials: int, seed: int) -> int:
    """Try so many schedules; how many there were. An AssertionError shows the smallest one that fails."""
    tried = 0

    @hypothesis.seed(seed)
    @settings(max_examples=trials, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(RULES, EVENTS)
    def trial(rules, events):
        nonlocal tried
        check_schedule(rules, events)
        tried += 1

    trial()
    return tried


def main() -> None:
    """Parse, try, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    tried = run(args.trials, args.seed)
    seconds = time.monotonic() - began
    print(f"{tried} schedules, after each event a checkpoint that verifies: {seconds:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()
