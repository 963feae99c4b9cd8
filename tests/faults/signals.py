"""Signals at random moments, to one rank or all, once or twice: saved and asked to be requeued, or ended at once."""

import os
import signal
import time
from pathlib import Path

from megalemur.checkpoint.directory import checkpoint_directories, verify_checkpoint
from megalemur.cli import exit_codes
from megalemur.supervise.process import descendants
from megalemur.supervise.signals import SAME_SECONDS
from tests.faults.campaign import Campaign, Trial
from tests.faults.runs import BIG, launch, write_run
from tests.support.launched import Launched, is_running, launched, wait_for
from tests.support.tiny import tiny_run

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_RUN = ("run.steps=100000", "run.collective_timeout=60", "checkpoint.save_every=3", "checkpoint.keep=2")


def trial(_: Path, trial: Trial) -> str:
    """One run that is signalled."""
    return _launched(trial) if trial.real else _forked(trial)


def _forked(trial: Trial) -> str:
    chance = trial.chance
    number, to = chance.choice(_SIGNALS), chance.choice(["supervisor", "worker", "everybody"])
    config = tiny_run(trial.directory, "parallel.data=2", *_RUN, num_layers=2)
    twice = chance.random() < 0.2
    with launched(config) as run:
        run.wait_for_step(1)
        time.sleep(chance.uniform(0, 2))
        saving = any((trial.directory / "checkpoints").glob("*.tmp-*"))
        if twice:
            # the save that the first signal asks for must still be under way when the second one comes
            os.kill(run.worker(1), signal.SIGSTOP)
        _send(run, number, to)
        if twice:
            time.sleep(SAME_SECONDS + 0.5)
            _send(run, number, to)
        codes = run.codes(60)
        expected = exit_codes.STOPPED_TWICE if twice else exit_codes.REQUEUE
        assert codes == [expected] * 2, (codes, run.output())
        wait_for(run.living, lambda living: not living, seconds=5)
        if not twice:
            newest = max(run.checkpoints())
            assert f"saved at step {newest}" in run.output(), run.output()
    for path in checkpoint_directories(trial.directory / "checkpoints")[:1]:
        verify_checkpoint(path)
    return f"{number.name}{' twice' if twice else ''} to {to}{', in a save' if saving else ''}"


def _send(run: Launched, number: signal.Signals, to: str) -> None:
    whom = ["supervisor", "worker"] if to == "everybody" else [to]
    ranks = (0, 1) if to == "everybody" else (0,)
    for rank in ranks:
        for who in whom:
            os.kill(getattr(run, who)(rank), number)


def _launched(trial: Trial) -> str:
    run_file = write_run(trial.directory, "parallel.data=2", *_RUN, **BIG)
    number = trial.chance.choice(_SIGNALS)
    process = launch(2, run_file)
    metrics, said = trial.directory / "log/metrics.jsonl", run_file.with_suffix(".log")
    wait_for(lambda: metrics.exists() and metrics.stat().st_size, bool, said.read_text)
    time.sleep(trial.chance.uniform(0, 5))
    everyone = [process.pid, *descendants(process.pid)]
    process.send_signal(number)
    code = process.wait(90)
    assert code == exit_codes.REQUEUE, (code, said.read_text()[-2000:])
    wait_for(lambda: [pid for pid in everyone if is_running(pid)], lambda living: not living, seconds=5)
    newest = checkpoint_directories(trial.directory / "checkpoints")[0]
    step = verify_checkpoint(newest).step
    assert f"saved at step {step}" in said.read_text()
    assert launch(2, run_file, f"run.stop_at={step + 1}").wait(120) == exit_codes.DONE, said.read_text()[-2000:]
    return f"{number.name} to the launcher"


CAMPAIGN = Campaign(
    target=300,
    what="SIGTERM, SIGINT, SIGUSR1, SIGUSR2 at random times, also inside a save, to rank, supervisor, all or the "
    "launcher, every fifth twice",
    passes=f"saved at the step at which it stopped, code {exit_codes.REQUEUE} on every rank; twice: "
    f"code {exit_codes.STOPPED_TWICE}; the newest checkpoint verifies, nothing is left running",
    prepare=lambda directory: directory,
    trial=trial,
)
