"""The launcher of the distributed tests: results, failures and hangs of ranks, and what a rank finds when it starts."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def coordinates(prefix):
    return prefix, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def sum_over_ranks():
    dist.init_process_group("gloo")
    mine = torch.tensor([2.0 ** dist.get_rank()])
    dist.all_reduce(mine)
    return mine, torch.get_num_threads()


def fail_on_rank_one():
    rank = int(os.environ["RANK"])
    if rank == 1:
        raise ValueError("one is not well")
    dist.init_process_group("gloo")


def fail_on_all():
    raise ValueError(f"rank {os.environ['RANK']} is not well")


def hang_on_rank_one():
    if os.environ["RANK"] == "1":
        wait_for_godot()
    return "done"


def wait_for_godot():
    time.sleep(1000)


def die_on_rank_one():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def imported_by_the_server():
    # this module imports none of them, so they were there before the fork
    return "megatron.core" in sys.modules, "megalemur.train.setup" in sys.modules, multiprocessing.parent_process().pid


def write_pid_and_hang(directory):
    (Path(directory) / os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(1000)


def test_results_come_back_in_rank_order():
    assert run_ranks(3, coordinates, "here") == [("here", rank, 3, rank) for rank in range(3)]


def test_ranks_meet_in_a_process_group_and_compute_on_one_thread_each():
    assert run_ranks(4, sum_over_ranks) == [(torch.tensor([15.0]), 1)] * 4


def test_ranks_start_with_the_program_imported():
    ((core, setup, parent),) = run_ranks(1, imported_by_the_server)
    assert core and setup and parent == os.getpid()


def test_the_traceback_of_a_failing_rank_is_shown_with_the_stacks_of_those_that_wait():
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, fail_on_rank_one)
    said = str(caught.value)
    assert "rank 1 error" in said and 'raise ValueError("one is not well")' in said
    assert "rank 0 was ended, since others had failed" in said and "in fail_on_rank_one" in said


def test_every_failing_rank_is_shown():
    with pytest.raises(AssertionError) as caught:
        run_ranks(3, fail_on_all)
    assert all(f"ValueError: rank {rank} is not well" in str(caught.value) for rank in range(3))


def test_the_stack_of_a_hanging_rank_is_shown():
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, hang_on_rank_one, timeout=1.0)
    said = str(caught.value)
    assert "rank 1 did not end in 1 s" in said and "in wait_for_godot" in said
    assert "rank 0" not in said


def test_a_rank_that_dies_is_named_with_its_signal():
    with pytest.raises(AssertionError, match=r"rank 1 died:\nended without a word, exit code -9"):
        run_ranks(2, die_on_rank_one)


def test_no_rank_outlives_the_process_that_started_it(tmp_path):
    start = f"from tests.support.ranks import run_ranks; from {__name__} import write_pid_and_hang as hang; "
    launcher = subprocess.Popen([sys.executable, "-c", f"{start}run_ranks(2, hang, {str(tmp_path)!r})"], cwd=ROOT)
    files = [tmp_path / "0", tmp_path / "1"]
    pids = wait_for(
        lambda: [int(file.read_text() or 0) for file in files if file.exists()],
        lambda found: all(found) and len(found) == 2,
    )
    launcher.kill()
    launcher.wait()
    wait_for(lambda: [pid for pid in pids if is_running(pid)], lambda living: not living)


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for(look, enough, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not enough(seen := look()):
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)
    return seen
