"""What was planned beside what was measured: in the records, and as a warning where they differ."""

import logging

import pytest

from megalemur.observe.against_plan import AgainstPlan
from megalemur.observe.build import Standing, build_observers
from megalemur.observe.expectation import Expectation
from tests.unit.observe.reports import report, run_config

GIB = 2**30


def after_twenty_steps(expectation, *, stages=2, seconds=2.0, peaks=()):
    against = AgainstPlan(expectation, stages=stages)
    for step in range(1, 21):
        against.after_step(report(step, seconds=30.0 if step <= 10 else seconds, peak_bytes=peaks))
    return against


def plan(seconds=2.0, peaks=()):
    return Expectation(step_seconds=seconds, peak_bytes=peaks, cluster="h100_sxm")


@pytest.mark.parametrize(("seconds", "warns"), [(2.0, False), (2.18, False), (2.3, True), (1.7, True)])
def test_a_step_time_that_differs_by_more_than_a_tenth_is_a_warning(seconds, warns, caplog):
    with caplog.at_level(logging.INFO, logger="megalemur.observe.against_plan"):
        facts = after_twenty_steps(plan(), seconds=seconds).facts()
    (said,) = caplog.records
    assert (said.levelno == logging.WARNING) == warns and "h100_sxm" in said.getMessage()
    assert facts == {"plan/step_seconds": 2.0, "plan/step_ratio": pytest.approx(seconds / 2.0)}


def test_the_stage_whose_memory_differs_is_named(caplog):
    peaks = [40 * GIB, 41 * GIB, 60 * GIB, 50 * GIB]  # of two ranks a stage the larger one counts
    with caplog.at_level(logging.INFO, logger="megalemur.observe.against_plan"):
        facts = after_twenty_steps(plan(peaks=(40 * GIB, 50 * GIB)), peaks=peaks).facts()
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1 and "stage 1" in warned[0] and "+20 %" in warned[0]
    assert (facts["peak_bytes_stage_0"], facts["plan/peak_bytes_stage_1"]) == (41 * GIB, 50 * GIB)


def test_nothing_is_claimed_before_the_eleventh_step():
    against = AgainstPlan(plan(), stages=1)
    for step in range(1, 11):
        against.after_step(report(step))
    assert against.facts() == {}


def test_a_run_with_a_plan_has_the_observer_and_its_records_the_figures(tmp_path):
    config = run_config(tmp_path, "run.steps=20")
    observers = build_observers(config, rank=0, label="tp0", first_step=0, standing=Standing(plan=plan()))
    for step in range(1, 21):
        for observer in observers:
            observer.after_step(report(step))
    for observer in observers:
        observer.at_end()
    assert '"plan/step_ratio":1.0' in (tmp_path / "metrics.jsonl").read_text().splitlines()[-1].replace(" ", "")
    without = build_observers(config, rank=0, label="tp0", first_step=0)
    assert not any(isinstance(observer, AgainstPlan) for observer in without)
