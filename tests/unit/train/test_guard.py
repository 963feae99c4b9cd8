"""The numerical guard alone: its window, its patience, its state."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalemur.config.guard import GuardConfig
from megalemur.config.strict_json import canonical_json
from megalemur.train.guard import Guard, GuardState, Verdict, spike_over

LIMITS = GuardConfig(loss_spike=10, grad_norm_spike=10, window=16, min_values=8, rollback_after=3)
GOOD = [2.0 + 0.01 * (number % 5) for number in range(16)]


def settled(limits=LIMITS, values=GOOD):
    guard = Guard(limits)
    for value in values:
        assert guard.judge(value, value) is Verdict.APPLY
    return guard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_always_skipped_and_never_enters_the_window(bad):
    guard = Guard(GuardConfig())
    for loss, norm in ((bad, 1.0), (1.0, bad)):
        assert guard.judge(loss, norm) is Verdict.SKIP
    assert guard.state == GuardState()
    assert [event.kind for event in guard.take_events()] == ["skip", "skip"]
    assert guard.take_events() == ()


def test_finite_values_are_never_spikes_where_nobody_asked():
    guard = settled(GuardConfig(min_values=1, window=16))
    assert guard.judge(1e30, 1e30) is Verdict.APPLY


@pytest.mark.parametrize(("loss", "norm", "said"), [(5.0, 2.0, "loss"), (2.0, 5.0, "gradient norm")])
def test_a_spike_is_skipped_named_and_kept_out_of_the_window(loss, norm, said):
    guard = settled()
    before = guard.state
    assert guard.judge(loss, norm) is Verdict.SKIP
    assert guard.state == before
    (event,) = guard.take_events()
    assert event.kind == "spike" and event.text.startswith(said)
    assert (event.facts["loss"], event.facts["grad_norm"], event.facts["rejected_in_a_row"]) == (loss, norm, 1)


def test_a_fall_is_no_spike():
    assert settled().judge(0.1, 0.1) is Verdict.APPLY


def test_too_few_values_judge_nobody():
    assert settled(values=GOOD[:7]).judge(100.0, 2.0) is Verdict.APPLY
    assert settled(values=GOOD[:8]).judge(100.0, 2.0) is Verdict.SKIP


def test_a_loss_that_stands_still_is_not_measured_against_nothing():
    guard = settled(values=[2.0] * 16)
    assert guard.judge(2.01, 2.0) is Verdict.APPLY
    assert guard.judge(2.1, 2.0) is Verdict.SKIP


def test_rejected_steps_in_a_row_end_in_a_rollback_also_across_a_restart():
    guard = settled()
    assert [guard.judge(math.nan, 1.0) for _ in range(2)] == [Verdict.SKIP] * 2
    assert guard.judge(2.0, 2.0) is Verdict.APPLY
    assert [guard.judge(bad, 2.0) for bad in (9.0, math.inf, 9.0)] == [Verdict.SKIP, Verdict.SKIP, Verdict.ROLL_BACK]
    again = Guard(LIMITS, rejected_in_a_row=2, state=guard.state)
    assert again.judge(9.0, 2.0) is Verdict.ROLL_BACK


def test_a_guard_goes_on_from_its_state_as_if_nothing_had_happened():
    values = [2.0 + 0.1 * math.sin(number * number) for number in range(60)] + [50.0, 2.0]
    one = Guard(LIMITS)
    other = Guard(LIMITS)
    for number, value in enumerate(values):
        if number % 7 == 0:
            other = Guard(LIMITS, state=GuardState.from_json(json.loads(canonical_json(other.state.model_dump()))))
        assert one.judge(value, value) is other.judge(value, value)
        assert one.state == other.state


@pytest.mark.parametrize(
    "state",
    [
        {"losses": ["2"], "grad_norms": []},
        {"losses": [1.0]},
        {"losses": [], "grad_norms": [], "more": 1},
        {"losses": [None], "grad_norms": [1.0]},
        [1],
        7,
    ],
)
def test_a_state_that_no_guard_writes_is_refused(state):
    with pytest.raises(ValueError, match=r"trainer/state\.json: guard"):
        GuardState.from_json(state)


@given(st.lists(st.floats(1.0, 3.0), min_size=9, max_size=40), st.lists(st.floats(-1e9, 1e9), max_size=4))
def test_a_minority_of_wild_values_hides_no_spike(good, wild):
    """What makes the measure robust: four of thirteen values may be anything."""
    assert spike_over([*good, *wild], 1e6) > 1e5


def test_a_normal_sample_is_measured_in_standard_deviations():
    import random

    generator = random.Random(3)
    values = [generator.gauss(5.0, 0.5) for _ in range(4000)]
    assert spike_over(values, 7.5) == pytest.approx(5.0, abs=0.3)
