"""Whole runs and their supervisors: signals and deadlines save and ask for another start, a second signal does not."""

import os
import signal
import time

import pytest

from megalemur.cli import exit_codes
from megalemur.supervise.signals import SAME_SECONDS
from tests.support.launched import Fault, launched, wait_for
from tests.support.tiny import tiny_run

STEP, SAVE = "megalemur.train.loop:train_step", "megalemur.checkpoint.saver:write_checkpoint"
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
    ("fault", "to"),
    [(Fault(-1, SAVE, 2, "sleep 600"), "supervisor"), (Fault(1, STEP, 4, "spin"), "worker")],
    ids=["in a save", "in a collective"],
)
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
