"""Where a process stands is read from what faulthandler writes, even while it is deep in a call."""

import os
import signal
import sys
import threading
import time

import pytest

from megalemur.supervise.process import Child, descendants, fork, is_stopped, state_of
from megalemur.supervise.stacks import Frame, Stacks, frames_of, keep, place_in, waits_for_others

TEXT = """Thread 0x00007f0000000001 (most recent call first):
  File "/x/threading.py", line 320 in wait
  File "/x/queue.py", line 171 in get

Current thread 0x00007f00000000ab (most recent call first):
  File "/lib/torch/distributed/distributed_c10d.py", line 2938 in all_reduce
  File "/src/megalemur/train/agreement.py", line 33 in agree
  File "/src/megalemur/train/loop.py", line 31 in run_loop
"""


def test_the_frames_of_the_thread_that_is_asked_for():
    frames = frames_of(TEXT, 0x7F00000000AB)
    assert [frame.function for frame in frames] == ["all_reduce", "agree", "run_loop"]
    assert str(place_in(frames)) == "agree (train/agreement.py:33)"
    assert waits_for_others(frames)
    other = frames_of(TEXT, 0x7F0000000001)
    assert other[0] == Frame("/x/threading.py", 320, "wait") and not waits_for_others(other)
    assert frames_of(TEXT, 0x1) == [] and place_in([]) is None and not waits_for_others([])


def test_a_handle_that_is_waited_for_counts_as_waiting(tmp_path):
    source = tmp_path / "p2p.py"
    source.write_text("for req in reqs:\n    req.wait()\n    compute(req)\n")
    assert waits_for_others([Frame(str(source), 2, "send")])
    assert not waits_for_others([Frame(str(source), 3, "send")])


@pytest.fixture
def busy():
    """A child that computes for ever."""
    stacks = Stacks()
    pid = fork()
    if pid == 0:
        stacks.listen()
        while True:
            pass
    child = Child(pid)
    time.sleep(0.2)
    yield child, stacks
    child.kill()


def test_a_process_that_never_returns_to_anybody_is_asked(busy):
    child, stacks = busy
    for _ in range(2):  # the second answer is not the first
        frames = frames_of(stacks.ask(child.pid), threading.main_thread().ident)
        assert frames[0].function == "busy" and frames[0].file == __file__


def test_a_stopped_process_is_seen_and_cannot_answer(busy):
    child, stacks = busy
    assert state_of(child.pid) == "running"
    os.kill(child.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while not is_stopped(state_of(child.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state_of(child.pid) == "stopped (T)"
    assert stacks.ask(child.pid) == ""


def test_killing_reaches_everything_below(busy):
    child, _ = busy
    pid = fork()
    if pid == 0:
        for _ in range(2):
            os.fork()
        time.sleep(600)
    family = Child(pid)
    deadline = time.monotonic() + 5
    while len(descendants(pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    below = descendants(pid)
    assert len(below) == 3 and child.pid not in below
    family.kill()
    assert family.code == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while any(state_of(one) not in ("", "dead (Z)") for one in below) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [state_of(one) for one in below if state_of(one) not in ("", "dead (Z)")] == []
    assert state_of(child.pid) == "running"


@pytest.mark.skipif(sys.platform != "linux", reason="this system is no Linux, which alone has prctl")
def test_a_child_does_not_outlive_its_parent():
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        pid = fork()
        if pid:
            os.write(writer, str(pid).encode())
        time.sleep(600)
    child = int(os.read(reader, 32))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 5
    while state_of(child) not in ("", "dead (Z)") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state_of(child) in ("", "dead (Z)")


def test_a_file_system_that_does_not_answer_holds_up_nobody(tmp_path):
    keep("text", tmp_path / "new/rank.txt")
    assert (tmp_path / "new/rank.txt").read_text() == "text"
    os.mkfifo(tmp_path / "fifo")  # nobody reads it: opening it never returns
    keep("text", tmp_path / "fifo")
