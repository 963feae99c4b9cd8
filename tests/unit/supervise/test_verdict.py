"""Who is named when a run hangs."""

from dataclasses import replace

from megalemur.supervise.pulse import Section
from megalemur.supervise.verdict import Account, culprits, hang_text

WAITING = Account(
    0, "node1", 10, 5, Section.STEP, 60.0, state="sleeping", waiting=True, place="agree (a.py:1)", top="x"
)


def named(*changes):
    accounts = [replace(WAITING, rank=rank, **change) for rank, change in enumerate(changes)]
    return [account.rank for account in culprits(accounts)[0]]


def test_the_one_that_does_not_wait_is_named():
    assert named({}, {}, {"waiting": False}, {}) == [2]


def test_all_that_fit_are_named():
    assert named({}, {"waiting": False}, {"stopped": True}, {"answered": False}) == [1, 2, 3]


def test_a_stopped_rank_in_a_collective_is_named():
    assert named({}, {"stopped": True, "waiting": True}) == [1]


def test_steps_tell_only_where_all_wait():
    assert named({}, {"steps": 4}, {}) == [1]
    assert named({}, {"steps": 4}, {"waiting": False}) == [2], "rank 1 waits for rank 2"


def test_where_nobody_waits_the_stopped_one_is_named():
    assert named({"waiting": False}, {"waiting": False, "stopped": True}) == [1]
    assert named({"waiting": False}, {"waiting": False}) == [0, 1]


def test_where_nothing_tells_all_are_named():
    assert named({}, {}) == [0, 1]


def test_the_message_names_rank_host_step_section_and_frames():
    guilty = replace(WAITING, rank=3, host="node2", waiting=False, place="draw (t.py:9)", top="read (u.py:2)")
    text = hang_text([WAITING, guilty], "log/stacks")
    assert "no progress for 60 s" in text and "stacks of all ranks: log/stacks" in text
    assert (
        "  rank 3 (node2, pid 10), at step 6, section step in draw (t.py:9), innermost read (u.py:2); sleeping" in text
    )


def test_five_hundred_culprits_do_not_make_five_hundred_lines():
    accounts = [replace(WAITING, rank=rank, waiting=False) for rank in range(500)]
    text = hang_text(accounts, "s")
    assert len(text.splitlines()) < 25 and "499" in text
