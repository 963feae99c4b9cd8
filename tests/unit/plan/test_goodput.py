"""Goodput against a simulation of failures, the best interval against a search, budgets against arithmetic."""

import math
import random

import pytest

from megalemur.plan.goodput import (
    LLAMA3_FAILURES,
    Reliability,
    best_interval,
    best_steps,
    between_failures,
    between_failures_of_nodes,
    budget,
    goodput,
)

HOUR = 3600.0
COSTS = Reliability(between_failures=3 * HOUR, save=60, restart=600)


def simulated(interval: float, costs: Reliability, stretches: int) -> float:
    """Share of the time that is kept, by playing failures."""
    dice, clock = random.Random(7), 0.0
    for _ in range(stretches):
        while True:
            failure = dice.expovariate(1 / costs.between_failures)
            if failure >= interval + costs.save:
                clock += interval + costs.save
                break
            clock += failure
            while (again := dice.expovariate(1 / costs.between_failures)) < costs.restart:
                clock += again
            clock += costs.restart
    return interval * stretches / clock


@pytest.mark.parametrize("interval", [600.0, 2000.0, 7200.0])
def test_goodput_is_what_playing_failures_gives(interval):
    # memoryless: after a restart a whole stretch is ahead again
    assert goodput(interval, COSTS) == pytest.approx(simulated(interval, COSTS, 20_000), rel=0.01)


@pytest.mark.parametrize("mean", [HOUR, 10 * HOUR, 500 * HOUR])
@pytest.mark.parametrize("save", [0.5, 30.0, 900.0])
def test_the_best_interval_beats_all_others(mean, save):
    costs = Reliability(between_failures=mean, save=save, restart=300)
    best = best_interval(costs)
    assert all(goodput(best, costs) >= goodput(best * factor, costs) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2))
    if save < mean / 1000:
        assert best == pytest.approx(math.sqrt(2 * save * mean), rel=0.03)  # Young 1974
    # Daly 2006, its higher-order estimate: the first terms of the same root
    if save < mean / 50:
        ratio = save / (2 * mean)
        daly = math.sqrt(2 * save * mean) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save
        assert best == pytest.approx(daly, rel=0.01)


def test_steps_between_saves_are_the_best_whole_number():
    for seconds in (2.0, 14.6, 300.0, 20_000.0):
        best = best_steps(seconds, COSTS)
        assert best is not None
        assert goodput(best * seconds, COSTS) == max(goodput(n * seconds, COSTS) for n in range(1, 2000))


def test_less_reliable_is_worse():
    shares = [
        goodput(1800, Reliability(between_failures=between_failures(gpus), save=20, restart=900))
        for gpus in (8, 512, 4096, 16384)
    ]
    assert shares == sorted(shares, reverse=True)
    behind = Reliability(between_failures=3 * HOUR, save=60, restart=600, written_behind=300)
    assert goodput(1800, behind) < goodput(1800, COSTS)
    assert best_interval(behind) == best_interval(COSTS)


def test_rates_become_times():
    # the paper counts a failure about every three hours
    assert between_failures(16384) == pytest.approx(54 * 24 * HOUR / 419)
    assert between_failures(2 * 16384, LLAMA3_FAILURES) == pytest.approx(between_failures(16384) / 2)
    assert between_failures_of_nodes(8, 400) == 50 * HOUR


def test_what_never_fails_needs_no_save():
    safe = Reliability(between_failures=between_failures(8, 0.0), save=10, restart=0)
    assert best_interval(safe) == math.inf and best_steps(1.0, safe) is None
    assert goodput(90, safe) == 0.9


def test_nothing_is_kept_where_failures_come_faster_than_saves():
    assert goodput(1e7, COSTS) == 0.0
    with pytest.raises(ValueError, match="save more often"):
        budget(1e12, 1e6, 64, kept=goodput(1e7, COSTS))


def test_a_budget_is_arithmetic():
    made = budget(90e9, 64 * 1100.0, 64, kept=0.5)
    assert made.gpu_hours == pytest.approx(90e9 / 1100 / 3600 / 0.5)
    assert made.days == pytest.approx(made.gpu_hours / 64 / 24)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Reliability(between_failures=0, save=1, restart=1),
        lambda: Reliability(between_failures=1, save=-1, restart=1),
        lambda: Reliability(between_failures=1, save=1, restart=math.inf),
        lambda: Reliability(between_failures=math.nan, save=1, restart=1),
        lambda: goodput(0, COSTS),
        lambda: goodput(math.inf, COSTS),
        lambda: best_steps(0, COSTS),
        lambda: between_failures(0),
        lambda: between_failures_of_nodes(1, 0),
        lambda: budget(1, 0, 1),
        lambda: budget(1, 1, 1, kept=1.5),
    ],
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must be|give|days"):
        wrong()
