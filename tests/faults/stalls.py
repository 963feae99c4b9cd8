"""A rank that is stopped, loops or blocks: named, and the run ended in time; clean steps raise no alarm."""

import os
import signal
import time
from pathlib import Path

from megalemur.cli import exit_codes
from tests.faults.campaign import Campaign, Trial
from tests.support.launched import Fault, launched, wait_for
from tests.support.tiny import tiny_run

_TIMEOUT = 4  # seconds
_PLACES = {
    "reading data": "megalemur.train.loop:draw",
    "the step": "megalemur.train.loop:train_step",
    "the schedule": "megalemur.train.step:run_schedule",
    "the report": "megalemur.train.loop:report",
}


def trial(_: Path, trial: Trial) -> str:
    """One stall, behind some clean steps under the same watch."""
    chance = trial.chance
    ranks = chance.choice([1, 2, 2, 3])
    rank, step = chance.randrange(ranks), chance.randrange(5, 30)
    action, place = chance.choice(["stop", "spin", "read"]), chance.choice(list(_PLACES))
    os.mkfifo(trial.directory / "fifo")  # nobody writes it
    act = {"spin": "spin", "read": f"read {trial.directory}/fifo"}.get(action)
    faults = [Fault(rank, _PLACES[place], step, act)] if act else []
    settings = (f"parallel.data={ranks}", "data.global_batch_size=12", "run.steps=100000", "run.collective_timeout=60")
    config = tiny_run(trial.directory, *settings, f"watchdog.timeout={_TIMEOUT}", num_layers=2)
    with launched(config, *faults) as run:
        run.wait_for_step(step - 1)
        if action == "stop":
            os.kill(run.worker(rank), signal.SIGSTOP)
        began = time.monotonic()
        codes = run.codes()
        took = time.monotonic() - began
        assert codes == [exit_codes.HANG] * ranks, (codes, run.output())
        assert took < _TIMEOUT + 5, took
        assert wait_for(run.living, lambda living: not living, seconds=5) == []
        named = {line for line in run.output().splitlines() if line.startswith("  rank ")}
        assert len(named) == 1 and next(iter(named)).startswith(f"  rank {rank} ("), (named, rank, run.output())
    return "stopped" if action == "stop" else f"{'loops' if action == 'spin' else 'blocks'} in {place}"


CAMPAIGN = Campaign(
    target=200,
    what="a rank that is stopped, loops or blocks at a random step and place, 1 to 3 ranks, behind 4 to 28 clean steps",
    passes=f"code {exit_codes.HANG} within watchdog.timeout + 5 s, that rank alone is named, nothing is left running",
    prepare=lambda directory: directory,
    trial=trial,
    real_every=0,
)
