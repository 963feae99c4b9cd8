"""What the hub makes of what supervisors say: when it asks for stacks, and how the run ends."""

import signal

import pytest

from megalemur.cli import exit_codes
from megalemur.supervise.endings import Ending
from megalemur.supervise.hub import ACCOUNT_SECONDS, DUMP, GRACE_SECONDS, Hub, Terms
from megalemur.supervise.pulse import Section

REQUEUE = exit_codes.REQUEUE


def hub(world_size=3):
    terms = Terms(world_size, REQUEUE, join_seconds=600, silence_seconds=20, stacks="log/stacks")
    return Hub(terms, started=0.0)


def word(kind="status", *, steps=5, section=Section.STEP, age=0.1, overdue=False, **more):
    message = {"host": "h", "pid": 7, "section": int(section), "steps": steps, "age": age, "overdue": overdue}
    return {"is": kind, **message, **more}


def account(*, waiting, state="sleeping", stopped=False, place="run_loop (train/loop.py:1)", **more):
    return word("account", waiting=waiting, state=state, stopped=stopped, place=place, top=place, **more)


def ended(code, **more):
    return word("ended", code=code, **more)


def all_at(this, now, **said):
    for rank in range(this.terms.world_size):
        this.said(rank, word(**said), now)


def ending(order):
    assert order is not None and order["do"] == "end", order
    return Ending.from_json(order)


def test_a_run_that_goes_well_is_left_alone_until_all_have_ended():
    this = hub()
    for now in range(5):
        all_at(this, now, steps=now)
        assert this.decide(now) is None
    for rank, when in ((2, 5.0), (0, 19.0)):
        this.said(rank, ended(0), when)
        this.said(1, word(), when)
        assert this.decide(when) is None, "the others end when they are ready, even much later"
    this.said(1, ended(0), 38.0)
    assert ending(this.decide(38.0)) == Ending("code", 0, "")


def test_ranks_that_were_asked_to_stop_end_one_after_the_other():
    this = hub()
    all_at(this, 0.0)
    for rank in range(3):
        assert this.decide(rank * 9.0) is None
        for other in range(rank, 3):
            this.said(other, word(section=Section.ENDING), rank * 9.0)
        this.said(rank, ended(REQUEUE), rank * 9.0)
    assert ending(this.decide(18.0)) == Ending("code", REQUEUE, "")


@pytest.mark.parametrize("code", [exit_codes.BAD_CONFIG, exit_codes.NUMERICAL_STOP, exit_codes.CRASH_LOOP])
def test_an_error_that_all_raise_within_the_grace_keeps_its_code(code):
    this = hub()
    all_at(this, 0.0)
    for rank in range(3):
        this.said(rank, ended(code), 1.0 + rank)
        assert rank == 2 or this.decide(1.0 + rank) is None
    assert ending(this.decide(3.5)) == Ending("code", code, "")


def test_an_error_of_one_rank_alone_ends_the_others_with_its_code():
    this = hub()
    all_at(this, 0.0)
    this.said(1, ended(exit_codes.BAD_DATA), 1.0)
    assert this.decide(1.0 + GRACE_SECONDS - 0.1) is None
    assert this.decide(1.0 + GRACE_SECONDS) == DUMP
    said = ending(this.decide(1.0 + GRACE_SECONDS + ACCOUNT_SECONDS))
    assert (said.kind, said.code) == ("code", exit_codes.BAD_DATA)
    assert "rank 1 (h, pid 7) ended with code 12" in said.text and "still running: rank 0, 2" in said.text


@pytest.mark.parametrize(
    ("code", "how"), [(-9, "killed by SIGKILL"), (-11, "killed by SIGSEGV"), (1, "ended with code 1")]
)
def test_a_dead_rank_is_named_with_its_signal_or_code(code, how):
    this = hub()
    all_at(this, 0.0)
    this.said(2, ended(code, steps=7, section=Section.SAVE), 1.0)
    assert this.decide(1.0 + GRACE_SECONDS) == DUMP
    for rank in (0, 1):
        this.said(rank, account(waiting=True), 4.2)
    said = ending(this.decide(4.3))
    assert said.kind == "died"
    assert "rank 2 (h, pid 7)" in said.text and how in said.text and "at step 8, section save" in said.text


def test_the_killed_rank_is_told_from_those_that_fail_because_of_it():
    this = hub()
    all_at(this, 0.0)
    for rank, code in ((0, 1), (2, 1), (1, -signal.SIGKILL)):  # the order in which supervisors look is chance
        this.said(rank, ended(code), 1.0)
    said = ending(this.decide(1.1))
    assert said.kind == "died" and said.text.startswith("rank 1 ") and "after it ended: rank 0, 2" in said.text


def test_a_lone_rank_s_own_code_counts():
    for code, kind in ((0, "code"), (1, "code"), (REQUEUE, "code"), (exit_codes.BAD_DATA, "code"), (-9, "died")):
        this = hub(1)
        this.said(0, ended(code), 1.0)
        said = ending(this.decide(1.0))
        assert (said.kind, said.code) == (kind, code if kind == "code" else 0)


def test_a_supervisor_that_vanishes_ends_the_run_at_once():
    this = hub()
    all_at(this, 0.0)
    this.lost(1, 1.0)
    assert this.decide(1.0) == DUMP
    for rank in (0, 2):
        this.said(rank, account(waiting=True), 1.5)
    said = ending(this.decide(1.5))
    assert said.kind == "died" and "rank 1" in said.text and "its supervisor is gone" in said.text


def test_a_rank_that_never_comes_is_named():
    this = hub()
    for rank in (0, 2):
        this.said(rank, word(section=Section.SETUP), 599.0)
    assert this.decide(599.0) is None
    for rank in (0, 2):
        this.said(rank, word(section=Section.SETUP), 601.0)
    assert this.decide(601.0) == DUMP
    said = ending(this.decide(601.0 + ACCOUNT_SECONDS))
    assert said.kind == "died" and "rank 1 was not heard of within 600 s" in said.text


def test_a_second_request_ends_everything_without_stacks():
    this = hub()
    all_at(this, 0.0)
    this.said(1, word("twice", text="SIGTERM: asked to stop a second time"), 1.0)
    this.said(1, ended(-9), 1.0)
    said = ending(this.decide(1.0))
    assert said.kind == "twice" and "rank 1" in said.text and "SIGTERM" in said.text


def stall(this, now=40.0):
    for rank in range(this.terms.world_size):
        this.said(rank, word(age=30.0, overdue=True), now)
    assert this.decide(now) == DUMP


def test_the_rank_that_does_not_wait_is_named():
    this = hub()
    all_at(this, 0.0)
    stall(this)
    this.said(0, account(waiting=True, age=30.5), 40.3)
    this.said(2, account(waiting=True, age=30.5), 40.3)
    assert this.decide(40.4) is None, "rank 1 may still answer"
    this.said(1, account(waiting=False, state="running", place="draw (train/agreement.py:9)", age=30.5), 40.8)
    said = ending(this.decide(40.9))
    guilty = [line for line in said.text.splitlines() if line.startswith("  rank")]
    assert said.kind == "hung" and len(guilty) == 1
    assert guilty[0].startswith("  rank 1 (h, pid 7), at step 6, section step in draw (train/agreement.py:9)")


def test_a_supervisor_that_does_not_answer_holds_up_nobody():
    this = hub()
    all_at(this, 0.0)
    stall(this)
    for rank in (0, 2):
        this.said(rank, account(waiting=True), 40.3)
    assert this.decide(40.0 + ACCOUNT_SECONDS - 0.1) is None
    said = ending(this.decide(40.0 + ACCOUNT_SECONDS))
    assert "  rank 1 (h, pid 7), at step 6, section step: no word from its supervisor" in said.text.splitlines()


def test_a_supervisor_that_falls_silent_is_a_stall():
    this = hub()
    all_at(this, 0.0)
    for rank in (0, 1):
        this.said(rank, word(), 19.0)
    assert this.decide(19.0) is None
    for rank in (0, 1):
        this.said(rank, word(), 21.0)
    assert this.decide(21.0) == DUMP


def test_a_job_that_was_suspended_as_a_whole_is_no_stall():
    this = hub()
    all_at(this, 0.0)
    this.said(0, word(), 500.0)
    this.forgive(499.5)
    assert this.decide(500.0) is None


@pytest.mark.parametrize("section", [Section.SETUP, Section.FIRST_STEPS, Section.SAVE, Section.VALIDATION])
def test_a_rank_in_a_slow_section_excuses_those_that_wait_for_it(section):
    this = hub()
    this.said(0, word(section=section, steps=5, age=500.0), 10.0)
    for rank in (1, 2):
        this.said(rank, word(steps=5, age=400.0, overdue=True), 10.0)
    assert this.decide(10.0) is None
    this.said(0, word(section=section, steps=5, age=9000.0, overdue=True), 11.0)
    assert this.decide(11.0) == DUMP, "until it is overdue itself"


def test_a_save_does_not_excuse_the_rank_that_it_waits_for():
    this = hub()
    for rank in (0, 2):
        this.said(rank, word(section=Section.SAVE, steps=6, age=30.0), 10.0)
    this.said(1, word(steps=5, age=30.0, overdue=True), 10.0)
    assert this.decide(10.0) == DUMP


def test_nonsense_is_passed_over():
    this = hub()
    for message in ({}, {"is": "status"}, {"is": "ended", "code": "x"}, {"is": 3}, word(section=99), word(steps="x")):
        this.said(1, message, 1.0)
    this.said(7, word(), 1.0)
    this.said(-1, word(), 1.0)
    this.lost(9, 1.0)
    assert this.decide(1.0) is None
    assert this.members[1].code is None
