import math
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalemur.config.optim import OptimConfig, ScheduleConfig
from megalemur.optim.schedule import learning_rate

PEAK = 4e-5
OPTIM = OptimConfig(learning_rate=PEAK)


def rates(total_steps, **settings):
    schedule = ScheduleConfig(**settings)
    return [learning_rate(step, OPTIM, schedule, total_steps) for step in range(total_steps)]


@st.composite
def schedules(draw):
    total = draw(st.integers(2, 200))
    kind = draw(st.sampled_from(["cosine", "constant", "wsd"]))
    warmup = draw(st.integers(0, total - 1))
    longest = total - warmup if kind == "wsd" else total
    shortest = 1 if kind == "wsd" else warmup + 1
    decay = None if kind == "constant" else draw(st.none() | st.integers(shortest, max(shortest, longest)))
    ratio = draw(st.sampled_from([0.0, 0.1, 1.0]))
    return total, ScheduleConfig(kind=kind, warmup_steps=warmup, decay_steps=decay, min_ratio=ratio)


def test_warm_up_runs_at_k_plus_one_over_warmup_steps():
    assert rates(10, kind="constant", warmup_steps=4) == pytest.approx([PEAK * x for x in (0.25, 0.5, 0.75, *[1] * 7)])


def test_cosine_by_hand():
    # 2 warm-up updates, then 4 quarters of a half turn: cos 45, 90, 135 and 180 degrees
    half = math.sqrt(0.5)
    shares = [0.5, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0.0]
    expected = [PEAK * 0.5, PEAK, *(PEAK * (0.1 + 0.9 * share) for share in shares[2:])]
    assert rates(6, kind="cosine", warmup_steps=2) == pytest.approx(expected)


def test_cosine_stays_at_the_floor_after_decay_steps():
    found = rates(8, kind="cosine", decay_steps=4, min_ratio=0.25)
    assert found[3:] == pytest.approx([PEAK * 0.25] * 5)
    assert found[2] > PEAK * 0.25


def test_wsd_by_hand():
    found = rates(10, kind="wsd", warmup_steps=2, decay_steps=4, min_ratio=0.2)
    assert found == pytest.approx([PEAK * x for x in (0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2)])


def test_wsd_decays_over_a_tenth_of_the_run_unless_told():
    found = rates(40, kind="wsd", min_ratio=0.0)
    assert found[35] == PEAK
    assert found[36:] == pytest.approx([PEAK * x for x in (0.75, 0.5, 0.25, 0)])


@given(schedules())
def test_rate_rises_through_the_warm_up_and_never_after(case):
    total, schedule = case
    found = [learning_rate(step, OPTIM, schedule, total) for step in range(total + 3)]
    warmup = schedule.warmup_steps
    assert all(a < b for a, b in pairwise(found[:warmup]))
    assert all(a >= b for a, b in pairwise(found[max(0, warmup - 1) :]))


@given(schedules())
def test_rate_is_bounded_by_floor_and_peak_after_the_warm_up(case):
    total, schedule = case
    floor = PEAK * schedule.min_ratio
    for step in range(total + 3):
        rate = learning_rate(step, OPTIM, schedule, total)
        assert 0 <= rate <= PEAK * (1 + 1e-12)
        if step >= schedule.warmup_steps:
            assert rate >= floor * (1 - 1e-12)


@given(schedules())
def test_last_update_of_a_decay_runs_at_the_floor(case):
    total, schedule = case
    expected = PEAK if schedule.kind == "constant" else PEAK * schedule.min_ratio
    assert learning_rate(total - 1, OPTIM, schedule, total) == pytest.approx(expected, abs=1e-20)


@given(st.sampled_from(["cosine", "wsd"]), st.integers(1, 200))
def test_no_jump_between_the_pieces(kind, warmup):
    total = 10 * warmup + 200
    found = rates(total, kind=kind, warmup_steps=warmup)
    # the steepest slopes: the warm-up's, a half turn's (pi / 2 over its length), and WSD's line over a tenth
    steepest = PEAK * max(1 / warmup, math.pi / 2 / (total - warmup), 1 / (total // 10))
    assert max(abs(a - b) for a, b in pairwise(found)) <= steepest * (1 + 1e-9)


def test_needs_no_torch():
    code = "import sys, megalemur.optim.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
