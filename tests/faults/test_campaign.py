"""Campaigns: a slice of each, and that a failed trial is recorded and trials add up."""

import os
import random
from pathlib import Path

import pytest

from tests.faults import campaign as module
from tests.faults.campaign import NAMES, Campaign, load, read_batches, run
from tests.faults.reliability import PAGE, render


def test_trials_add_up_and_failures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float, bool]] = []

    def trial(shared: Path, trial: module.Trial) -> str:
        assert shared.is_dir() and not any(trial.directory.iterdir())
        seen.append((trial.number, trial.chance.random(), trial.real))
        assert trial.number != 3, "the third does not pass"
        return "odd" if trial.number % 2 else "even"

    fake = Campaign(target=30, what="", passes="", prepare=lambda directory: directory, trial=trial)
    monkeypatch.setattr(module, "load", lambda name: fake)
    run("fake", trials=5, seed=7, results=tmp_path)
    run("fake", trials=7, seed=7, results=tmp_path)
    assert [number for number, _, _ in seen] == list(range(12))
    assert seen[2][1] == random.Random("fake/7/2").random()
    assert [number for number, _, real in seen if real] == [0, 10]
    first, second = read_batches("fake", tmp_path)
    assert (first.first, first.trials, first.spread) == (0, 5, {"even": 3, "odd": 1})
    assert [failure["trial"] for failure in first.failures] == [3] and "does not pass" in first.failures[0]["said"]
    assert (second.first, second.trials, second.real) == (5, 7, 1)
    run("fake", trials=2, seed=8, results=tmp_path)
    assert seen[-1][0] == 1, "another seed has trials of its own"


def test_trials_that_are_made_at_once_count_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(_: Path, trial: module.Trial) -> str | list[str]:
        assert trial.number != 100, "all five of them"
        return ["real"] * 5 if trial.real else "small"

    fake = Campaign(target=200, what="", passes="", prepare=lambda directory: directory, trial=trial, at_once=5)
    monkeypatch.setattr(module, "load", lambda name: fake)
    (batch,) = run("fake", trials=150, seed=0, results=tmp_path)
    assert (batch.trials, batch.real, batch.spread) == (150, 15, {"real": 10, "small": 135})
    assert [failure["trial"] for failure in batch.failures] == [100, 101, 102, 103, 104]


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text() == render()


SLICES = {"damage": 15, "crash_points": 3, "replica_flips": 2, "builds": 0, "resume_same_layout": 0} | {
    "clean_steps": 0,
    "conversions": 5,
    "soak": 0,
}
"""Trials in each run of the tests, where not one: building and resuming have tests of their own, a soak takes long."""


@pytest.mark.parametrize("name", [name for name in NAMES if SLICES.get(name, 1)])
def test_a_slice_passes(tmp_path: Path, name: str) -> None:
    campaign, seed = load(name), os.getpid()
    (tmp_path / "shared").mkdir()
    shared = campaign.prepare(tmp_path / "shared")
    for number in range(1, SLICES.get(name, 1) + 1):
        (tmp_path / f"{number}").mkdir()
        chance = random.Random(f"{name}/{seed}/{number}")
        campaign.trial(shared, module.Trial(number, chance, tmp_path / f"{number}", real=False))


@pytest.mark.parametrize("name", NAMES)
def test_every_campaign_says_what_it_does(name: str) -> None:
    campaign = load(name)
    assert campaign.target >= 1 and campaign.what and campaign.passes
    recorded = read_batches(name)
    for batch in recorded:
        assert sum(batch.spread.values()) + len(batch.failures) == batch.trials and batch.when
