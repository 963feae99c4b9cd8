"""A rank or its supervisor is killed at a random moment: all others are gone in ten seconds, and say why."""

import os
import signal
import time
from pathlib import Path

from megalemur.cli import exit_codes
from megalemur.supervise.process import descendants
from tests.faults.campaign import Campaign, Trial
from tests.faults.runs import BIG, launch, process_of, write_run
from tests.support.launched import is_running, launched, wait_for
from tests.support.tiny import tiny_run

_LIMIT = 10  # seconds
_RUN = ("run.steps=100000", "run.collective_timeout=60", "checkpoint.save_every=5", "checkpoint.keep=1")


def trial(_: Path, trial: Trial) -> str:
    """One kill."""
    return _launched(trial) if trial.real else _forked(trial)


def _forked(trial: Trial) -> str:
    chance, ranks = trial.chance, trial.chance.choice([2, 2, 3])
    layout = (f"parallel.data={ranks}", "data.global_batch_size=12")
    whom, rank = chance.choice(["worker", "worker", "supervisor"]), chance.randrange(ranks)
    config = tiny_run(trial.directory, *layout, *_RUN, num_layers=2)
    with launched(config) as run:
        when = chance.choice(["setup", "steps", "steps", "save"])
        if when == "setup":
            wait_for(lambda: all(descendants(process.pid) for process in run.processes), bool)
            time.sleep(chance.uniform(0, 1.5))
        else:
            run.wait_for_step(1)
            time.sleep(chance.uniform(0, 2))
        if when == "save":
            temporary = trial.directory / "checkpoints"
            wait_for(lambda: list(temporary.glob("*.tmp-*")), bool)
        everyone = {pid for process in run.processes for pid in (process.pid, *descendants(process.pid))}
        victim = getattr(run, whom)(rank)
        began = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        codes = run.codes()
        took = time.monotonic() - began
        assert took < _LIMIT, (took, codes, run.output())
        expected = [exit_codes.RANK_DIED] * ranks
        if whom == "supervisor":
            expected[rank] = -signal.SIGKILL
        assert codes == expected, (codes, run.output())
        left = wait_for(lambda: [pid for pid in everyone if is_running(pid)], lambda living: not living, seconds=5)
        assert left == []
        if whom == "worker":
            assert f"megalemur: rank {rank} (" in run.output(), run.output()
    return f"{whom}, in {when}"


def _launched(trial: Trial) -> str:
    run_file = write_run(trial.directory, "parallel.data=2", *_RUN, **BIG)
    process = launch(2, run_file)
    metrics = trial.directory / "log/metrics.jsonl"
    said = run_file.with_suffix(".log")
    wait_for(lambda: metrics.exists() and metrics.stat().st_size, bool, said.read_text)
    time.sleep(trial.chance.uniform(0, 5))
    everyone = [process.pid, *descendants(process.pid)]
    victim, _ = process_of(everyone, trial.chance.randrange(2))
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    code = process.wait(60)
    took = time.monotonic() - began
    assert code == exit_codes.RANK_DIED and took < _LIMIT, (code, took, said.read_text()[-2000:])
    wait_for(lambda: [pid for pid in everyone if is_running(pid)], lambda living: not living, seconds=5)
    return "worker of the launcher"


CAMPAIGN = Campaign(
    target=300,
    what="kill -9 of a rank or its supervisor, in setup, between steps, in a step, in a save; 2 or 3 ranks",
    passes=f"all gone within {_LIMIT} s, no orphan, code {exit_codes.RANK_DIED}, who died is named",
    prepare=lambda directory: directory,
    trial=trial,
)
