"""Whole runs and their supervisors: stalls and deaths end them in time, with the right code, and slowness does not."""

import os
import signal
import time

import pytest

from megalemur.cli import exit_codes
from tests.support.launched import Fault, launched, wait_for
from tests.support.tiny import tiny_run

STEP, SAVE = "megalemur.train.loop:train_step", "megalemur.checkpoint.saver:write_checkpoint"
TWO = ("parallel.data=2", "run.steps=100000", "run.collective_timeout=60")
TIMEOUT = 4


def run_of(directory, *overrides):
    return tiny_run(directory, *TWO, *overrides)


@pytest.mark.parametrize(
    ("rank", "action"), [(0, "spin"), (1, "read {}/fifo"), (0, "stop"), (1, "stop")], ids=lambda value: str(value)[:4]
)
def test_a_rank_that_stalls_is_named_and_ends_the_run(tmp_path, rank, action):
    os.mkfifo(tmp_path / "fifo")  # nobody writes it
    faults = () if action == "stop" else (Fault(rank, STEP, 4, action.format(tmp_path)),)
    with launched(run_of(tmp_path, f"watchdog.timeout={TIMEOUT}"), *faults) as run:
        run.wait_for_step(3)
        if action == "stop":
            os.kill(run.worker(rank), signal.SIGSTOP)
        began = time.monotonic()
        codes = run.codes()
        took = time.monotonic() - began
        assert codes == [exit_codes.HANG] * 2 and took < TIMEOUT + 5, (took, run.output())
        assert wait_for(run.living, lambda living: not living, seconds=5) == []
        (guilty,) = {line for line in run.output().splitlines() if line.startswith("  rank ")}
        assert guilty.startswith(f"  rank {rank} (")
    stacks = [(tmp_path / f"log/stacks/rank-0000{number}.txt").read_text() for number in (rank, 1 - rank)]
    assert "distributed_c10d.py" in stacks[1]
    if action == "stop":
        assert "stopped (T)" in guilty and "stopped (T)" in stacks[0]
    else:
        assert "at step 4, section step in run_loop (train/loop.py:" in guilty and "in happen" in stacks[0]


def test_slow_first_steps_and_saves_raise_no_alarm(tmp_path):
    config = run_of(tmp_path, f"watchdog.timeout={TIMEOUT}", "run.stop_at=3")
    slow = f"sleep {TIMEOUT + 1}"
    with launched(config, Fault(1, STEP, 1, slow), Fault(0, SAVE, 1, slow)) as run:
        assert run.codes() == [exit_codes.DONE] * 2, run.output()
        assert run.checkpoints() == [3]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_in_a_save_is_no_slow_save(tmp_path, rank):
    config = run_of(tmp_path, f"watchdog.timeout={TIMEOUT}", "run.stop_at=3", "checkpoint.asynchronous=false")
    with launched(config, Fault(rank, SAVE, 1, "sleep 60")) as run:
        run.wait_for_step(3)
        time.sleep(1)
        os.kill(run.worker(rank), signal.SIGSTOP)
        began = time.monotonic()
        assert run.codes() == [exit_codes.HANG] * 2, run.output()
        took = time.monotonic() - began
        assert TIMEOUT < took < TIMEOUT + 5, (took, run.output())
        (guilty,) = {line for line in run.output().splitlines() if line.startswith("  rank ")}
        assert guilty.startswith(f"  rank {rank} (") and "stopped (T)" in guilty and "section save" in guilty


def test_a_job_that_is_suspended_and_goes_on_raises_no_alarm(tmp_path):
    with launched(run_of(tmp_path, f"watchdog.timeout={TIMEOUT}")) as run:
        run.wait_for_step(3)
        everyone = run.living()
        for number, seconds in ((signal.SIGSTOP, TIMEOUT + 2.0), (signal.SIGCONT, 2.0)):
            for pid in everyone:
                os.kill(pid, number)
            time.sleep(seconds)
        os.kill(run.supervisor(0), signal.SIGTERM)
        assert run.codes() == [exit_codes.REQUEUE] * 2, run.output()


@pytest.mark.parametrize("whom", ["worker", "supervisor"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_others(tmp_path, whom, rank):
    with launched(run_of(tmp_path)) as run:
        run.wait_for_step(2)
        began = time.monotonic()
        os.kill(getattr(run, whom)(rank), signal.SIGKILL)
        codes = run.codes()
        assert time.monotonic() - began < 10, run.output()
        expected = [exit_codes.RANK_DIED] * 2
        if whom == "supervisor":
            expected[rank] = -signal.SIGKILL
        assert codes == expected, run.output()
        assert wait_for(run.living, lambda living: not living, seconds=5) == []
        if whom == "worker":
            assert f"megalemur: rank {rank} (" in run.output() and "killed by SIGKILL" in run.output()


def test_a_crash_of_one_rank_is_its_death(tmp_path):
    with launched(run_of(tmp_path), Fault(1, STEP, 3, "raise")) as run:
        assert run.codes() == [exit_codes.RANK_DIED] * 2, run.output()
        assert "RuntimeError: injected" in run.outputs[1].read_text()


def test_a_death_before_the_ranks_have_met_ends_the_others_too(tmp_path):
    with launched(run_of(tmp_path), Fault(1, "megalemur.train.run:join", 1, "kill")) as run:
        assert run.codes() == [exit_codes.RANK_DIED] * 2, run.output()
        assert "rank 1 (" in run.outputs[0].read_text() and "section setup" in run.outputs[0].read_text()


def test_an_error_of_all_ranks_keeps_its_code(tmp_path):
    config = run_of(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"")
    with launched(config) as run:
        assert run.codes() == [exit_codes.BAD_DATA] * 2, run.output()
        assert "Traceback" not in run.output()


def test_a_run_that_gets_nowhere_is_not_started_a_fourth_time(tmp_path):
    config = tiny_run(tmp_path)
    for _ in range(3):
        with launched(config, Fault(0, STEP, 1, "kill")) as run:
            assert run.codes() == [exit_codes.RANK_DIED], run.output()
    with launched(config) as run:
        assert run.codes() == [exit_codes.CRASH_LOOP], run.output()
        assert "delete" in run.output() and "starts.jsonl" in run.output()
    (tmp_path / "checkpoints/starts.jsonl").unlink()
    with launched(config) as run:
        assert run.codes() == [exit_codes.DONE], run.output()


def test_the_hang_of_a_lone_rank_ends_it(tmp_path):
    with launched(tiny_run(tmp_path, f"watchdog.timeout={TIMEOUT}"), Fault(0, STEP, 4, "spin")) as run:
        assert run.codes() == [exit_codes.HANG], run.output()
        assert "rank 0" in run.output() and "run_loop" in run.output()
