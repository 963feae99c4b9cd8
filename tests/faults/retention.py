"""Random schedules of saves, kills, restarts and damage: there is always a checkpoint that verifies."""

from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, given, settings

from tests.faults.campaign import Campaign, Trial
from tests.unit.checkpoint.test_retention import EVENTS, RULES, check_schedule

_SCHEDULES = 20


def trial(_: Path, trial: Trial) -> str:
    """Some schedules; hypothesis shows the smallest one that fails."""

    @hypothesis.seed(trial.chance.randrange(1 << 32))
    @settings(max_examples=_SCHEDULES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(RULES, EVENTS)
    def schedules(rules, events):
        check_schedule(rules, events)

    schedules()
    return f"{_SCHEDULES} schedules"


CAMPAIGN = Campaign(
    target=50,
    what=f"random schedules of saves, kills at any effect on the disk, restarts and damage, {_SCHEDULES} a trial",
    passes="never below one checkpoint that verifies; what is to stay for good is there",
    prepare=lambda directory: directory,
    trial=trial,
    has_real=False,
)
