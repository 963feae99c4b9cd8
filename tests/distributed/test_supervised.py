"""Whole runs under their supervisors: signals, deadlines, stalls and deaths end them in time, with the right code."""

import os
import signal
import time

import pytest

from megalemur.cli import exit_codes
from megalemur.supervise.signals import SAME_SECONDS
from tests.support.launched import Fault, launched, wait_for
from tests.support.tiny import tiny_run

STEP, SAVE = "megalemur.train.loop:train_step", "megalemur.train.loop:save_run"
TWO = ("parallel.data=2", "run.steps=100000", "run.collective_timeout=60")


def run_of(directory, *overrides):
    return tiny_run(directory, *TWO, *overrides)


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "supervisor"),
        (signal.SIGINT, "worker"),
        (signal.SIGUSR1, "supervisor"),
        (signal.SIGUSR2, "worker"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_signal_to_one_rank_saves_and_asks_to_be_started_again(tmp_path, number, to):
    with launched(run_of(tmp_path)) as run:
        run.wait_for_step(2)
        os.kill(getattr(run, to)(1), number)
        assert run.codes() == [exit_codes.REQUEUE] * 2, run.output()
        (saved,) = run.checkpoints()
        assert saved >= 2 and f"saved at step {saved}" in run.output()
        assert run.living() == []


def test_one_request_that_everybody_hears_several_times_is_one(tmp_path):
    with launched(run_of(tmp_path)) as run:
        run.wait_for_step(2)
        for rank in (0, 1):
            for pid in (run.worker(rank), run.supervisor(rank), run.supervisor(rank)):
                os.kill(pid, signal.SIGTERM)
        assert run.codes() == [exit_codes.REQUEUE] * 2, run.output()
        assert len(run.checkpoints()) == 1


@pytest.mark.parametrize(
    "fault", [Fault(-1, SAVE, 2, "sleep 600"), Fault(1, STEP, 4, "spin")], ids=["save", "collective"]
)
@pytest.mark.parametrize("to", ["supervisor", "worker"])
def test_a_second_signal_ends_at_once_and_the_last_checkpoint_is_intact(tmp_path, fault, to):
    with launched(run_of(tmp_path, "checkpoint.save_every=2"), fault) as run:
        run.wait_for_step(3)
        wait_for(run.checkpoints, bool)
        os.kill(getattr(run, to)(0), signal.SIGTERM)
        time.sleep(SAME_SECONDS + 0.5)
        assert len(run.living()) == 4, "one signal alone interrupts neither"
        os.kill(getattr(run, to)(0), signal.SIGTERM)
        assert run.codes(seconds=10) == [exit_codes.STOPPED_TWICE] * 2, run.output()
        assert run.checkpoints() == [2] and run.living() == []


def test_a_deadline_of_one_rank_stops_all(tmp_path):
    config = run_of(tmp_path, "run.stop_before=1h")
    # it has passed on any clock
    with launched(config, MEGALEMUR_JOB_END=str(int(time.time()) + 3600)) as run:
        assert run.codes() == [exit_codes.REQUEUE] * 2, run.output()
        assert run.checkpoints() == [0]


def test_a_deadline_without_an_end_is_said_once(tmp_path):
    config = run_of(tmp_path, "run.stop_before=1h", "run.stop_at=1")
    with launched(config, MEGALEMUR_JOB_END="", SLURM_JOB_END_TIME="") as run:
        assert run.codes() == [exit_codes.DONE] * 2, run.output()
        assert run.output().count("says when this job ends") == 1


def ends_as_a_hang(run, timeout, since):
    codes = run.codes()
    took = time.monotonic() - since
    assert codes == [exit_codes.HANG] * 2, run.output()
    assert took < timeout + 5, run.output()
    assert wait_for(run.living, lambda living: not living, seconds=5) == []
    return run.output()


STALLS = {
    "looping": ("spin", "in faulty (support/launched.py"),
    "blocked in a read": ("read {}/fifo", "in faulty (support/launched.py"),
    "asleep": ("sleep 600", "in faulty (support/launched.py"),
}


@pytest.mark.parametrize("kind", STALLS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stalls_is_named_and_ends_the_run(tmp_path, kind, rank):
    action, named = STALLS[kind]
    os.mkfifo(tmp_path / "fifo")
    fault = Fault(rank, STEP, 4, action.format(tmp_path))
    with launched(run_of(tmp_path, "watchdog.timeout=4"), fault) as run:
        run.wait_for_step(3)
        output = ends_as_a_hang(run, 4, time.monotonic())
    (guilty,) = {line for line in output.splitlines() if line.startswith("  rank ")}
    assert guilty.startswith(f"  rank {rank} (") and "at step 4, section step" in guilty
    assert "run_loop (train/loop.py" in guilty
    stacks = (tmp_path / f"log/stacks/rank-{rank:05d}.txt").read_text()
    assert "in happen" in stacks
    assert "distributed_c10d.py" in (tmp_path / f"log/stacks/rank-{1 - rank:05d}.txt").read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_ends_the_run(tmp_path, rank):
    with launched(run_of(tmp_path, "watchdog.timeout=4")) as run:
        run.wait_for_step(3)
        os.kill(run.worker(rank), signal.SIGSTOP)
        output = ends_as_a_hang(run, 4, time.monotonic())
    (guilty,) = {line for line in output.splitlines() if line.startswith("  rank ")}
    assert guilty.startswith(f"  rank {rank} (") and "stopped (T)" in guilty


def test_slow_first_steps_saves_and_validation_raise_no_alarm(tmp_path):
    config = run_of(
        tmp_path,
        *("watchdog.timeout=2", "checkpoint.save_every=3", "run.stop_at=4", "data.validate_every=3"),
        *("data.validation=[{name: v, path: " + str(tmp_path / "a") + "}]", "data.validation_samples=8"),
    )
    slow = (
        Fault(1, STEP, 1, "sleep 4"),
        Fault(0, SAVE, 1, "sleep 4"),
        Fault(0, "megalemur.train.loop:validate", 1, "sleep 4"),
    )
    with launched(config, *slow) as run:
        assert run.codes() == [exit_codes.DONE] * 2, run.output()
        assert run.checkpoints() == [3, 4]


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
    (tmp_path / "a.bin").unlink(missing_ok=True)
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
    with launched(tiny_run(tmp_path, "watchdog.timeout=2"), Fault(0, STEP, 4, "spin")) as run:
        assert run.codes() == [exit_codes.HANG], run.output()
        assert "rank 0" in run.output() and "run_loop" in run.output()
