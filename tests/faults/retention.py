"""Random schedules of saves, kills, restarts and damage: there is always a checkpoint that verifies."""

from pathlib import Path
from random import Random

from megalemur.checkpoint.directory import verify_checkpoint
from megalemur.checkpoint.retention import Fate, Rules, fates, survey
from tests.faults.campaign import Campaign, Trial
from tests.faults.runs import BIG, LAYOUTS, end_at, finish, world, write_run
from tests.unit.checkpoint.test_retention import check_schedule

_STEPS = 6


def _rules(chance: Random) -> Rules:
    return Rules(chance.randint(1, 3), chance.choice([0, 4]), chance.choice([0, 2, 3]))


def _event(chance: Random) -> tuple:
    return chance.choice(
        [
            ("save", chance.choice([0, 0, *range(1, 60)])),
            ("damage", chance.randint(0, 5), chance.choice(["flip", "cut", "gone"])),
            ("restart",),
        ]
    )


def trial(shared: Path, trial: Trial) -> str:
    """One schedule: of small checkpoints, or of a launched run that is killed once."""
    rules = _rules(trial.chance)
    if trial.real:
        return _launched(trial, rules)
    events = [_event(trial.chance) for _ in range(trial.chance.randint(3, 12))]
    check_schedule(rules, events)
    return f"{sum(event == 'damage' for event, *_ in events)} times damaged"


def _launched(trial: Trial, rules: Rules) -> str:
    layout = trial.chance.choice([name for name in LAYOUTS if world(name) <= 2])
    keep = [f"checkpoint.{name}={value}" for name, value in rules._asdict().items()]
    settings = (*LAYOUTS[layout], *keep, "checkpoint.save_every=1", f"run.stop_at={_STEPS}")
    run_file = write_run(trial.directory, *settings, **BIG)
    root = trial.directory / "checkpoints"
    end_at(layout, run_file, trial.chance)
    there = [item for item in survey(root) if item.is_whole]
    assert there or not any(root.glob("step_??????")), "checkpoints, and none that is whole"
    for item in there:
        verify_checkpoint(item.path)
    finish(layout, run_file)
    found = survey(root)
    assert found[0].step == _STEPS and all(fate is not Fate.GOES for fate in fates(found, rules).values())
    for item in found:
        verify_checkpoint(item.path)
    return "launched, killed once"


CAMPAIGN = Campaign(
    target=1000,
    what="retention under random schedules of saves, kills at any effect on the disk, restarts and damage",
    passes="after each event a checkpoint that verifies, as soon as there was one",
    prepare=lambda directory: directory,
    trial=trial,
)
