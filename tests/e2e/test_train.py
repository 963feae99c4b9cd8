"""The commands that a user types, as processes: train, stop by a signal, resume, generate, refuse."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from megalemur.cli import exit_codes
from megalemur.config.load import dump_run
from megalemur.supervise.process import descendants
from tests.support.launched import is_running, wait_for
from tests.support.tiny import tiny_run, write_llama

ROOT = Path(__file__).parents[2]
TWO = ("parallel.pipeline=2", "parallel.chunks=2", "log.tensorboard=true")


def launch(processes, run_file, *overrides):
    command = ["bash", str(ROOT / "launch/local.sh"), str(processes), str(run_file), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def finish(process, seconds=150):
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def steps_of(directory):
    lines = (directory / "log/metrics.jsonl").read_bytes().splitlines()
    return [orjson.loads(line)["step"] for line in lines]


@pytest.fixture
def run_file(tmp_path):
    config = tiny_run(tmp_path, "run.steps=400", *TWO, start_from=write_llama(tmp_path / "hf"))
    path = tmp_path / "run.yaml"
    path.write_text(dump_run(config))
    return path


def launch_and_wait_for_a_step(directory, run_file):
    process = launch(2, run_file)
    metrics = directory / "log/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 0):
        assert time.monotonic() < deadline and process.poll() is None, finish(process)
        time.sleep(0.2)
    return process


def test_a_signal_saves_and_the_next_start_goes_on(tmp_path, run_file):
    process = launch_and_wait_for_a_step(tmp_path, run_file)
    process.send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code == exit_codes.REQUEUE, output
    (saved,) = (tmp_path / "checkpoints").glob("step_*")
    step = int(saved.name.removeprefix("step_"))
    assert 0 < step < 400, output
    code, output = finish(launch(2, run_file, f"run.stop_at={step + 2}"))
    assert code == 0, output
    assert steps_of(tmp_path) == list(range(1, step + 3))
    assert "resuming" in output


def test_nothing_outlives_a_launcher_that_is_killed(tmp_path, run_file):
    process = launch_and_wait_for_a_step(tmp_path, run_file)
    below = descendants(process.pid)
    assert len(below) >= 4, "two supervisors and two ranks"
    process.kill()
    _, output = finish(process, seconds=10)
    assert "the launcher" in output and "is gone" in output
    assert wait_for(lambda: [pid for pid in below if is_running(pid)], lambda living: not living, seconds=10) == []


def test_wrong_input_ends_before_any_process_group_and_says_what_to_write(tmp_path, run_file):
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", "megalemur.cli.main", "train", str(run_file)]
    # nobody listens on port 1: a process group would wait for its time limit
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert ended.returncode == 11
    assert "3 processes were started" in ended.stderr and "Traceback" not in ended.stderr
