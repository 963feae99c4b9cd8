"""A rank that is stopped, loops or blocks: named, and the run ended in time; clean steps raise no alarm."""

import os
import signal
import time
from pathlib import Path

from megalemur.cli import exit_codes
from megalemur.supervise.process import descendants
from tests.faults.campaign import Campaign, Trial
from tests.faults.runs import BIG, kill_group, launch, process_of, write_run
from tests.support.launched import Fault, is_running, launched, wait_for
from tests.support.tiny import tiny_run

_TIMEOUT = 4  # seconds
_RUN = ("run.steps=100000", "run.collective_timeout=60")
_PLACES = {
    "reading data": "megalemur.train.loop:draw",
    "the step": "megalemur.train.loop:train_step",
    "the schedule": "megalemur.train.step:run_schedule",
    "the report": "megalemur.train.loop:report",
}


def trial(_: Path, trial: Trial) -> str:
    """One stall, behind some clean steps under the same watch."""
    return _launched(trial) if trial.real else _forked(trial)


def _launched(trial: Trial) -> str:
    """A rank of the launcher is stopped."""
    step, rank = trial.chance.randrange(2, 8), trial.chance.randrange(2)
    run_file = write_run(trial.directory, "parallel.data=2", *_RUN, f"watchdog.timeout={_TIMEOUT}", **BIG)
    process, said, metrics = launch(2, run_file), run_file.with_suffix(".log"), trial.directory / "log/metrics.jsonl"
    try:
        wait_for(
            lambda: metrics.read_bytes().count(b"\n") if metrics.exists() else 0, lambda n: n >= step, said.read_text
        )
        everyone = [process.pid, *descendants(process.pid)]
        os.kill(process_of(everyone, rank)[0], signal.SIGSTOP)
        began = time.monotonic()
        code = process.wait(60)
        took = time.monotonic() - began
        assert (code, took < _TIMEOUT + 5) == (exit_codes.HANG, True), (code, took, said.read_text()[-2000:])
        wait_for(lambda: [pid for pid in everyone if is_running(pid)], lambda living: not living, seconds=5)
    finally:
        if process.poll() is None:
            kill_group(process)
    named = {line for line in said.read_text().splitlines() if line.startswith("  rank ")}
    assert len(named) == 1 and next(iter(named)).startswith(f"  rank {rank} ("), (named, rank)
    return "launched: stopped"


def _forked(trial: Trial) -> str:
    chance = trial.chance
    ranks = chance.choice([1, 2, 2, 3])
    rank, step = chance.randrange(ranks), chance.randrange(5, 30)
    action, place = chance.choice(["stop", "stop in a save", "spin", "read"]), chance.choice(list(_PLACES))
    if action == "stop in a save":
        return _stopped_in_a_save(trial, ranks, rank)
    os.mkfifo(trial.directory / "fifo")  # nobody writes it
    act = {"spin": "spin", "read": f"read {trial.directory}/fifo"}.get(action)
    faults = [Fault(rank, _PLACES[place], step, act)] if act else []
    settings = (f"parallel.data={ranks}", "data.global_batch_size=12")
    config = tiny_run(trial.directory, *settings, *_RUN, f"watchdog.timeout={_TIMEOUT}", num_layers=2)
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


def _stopped_in_a_save(trial: Trial, ranks: int, rank: int) -> str:
    """A save that takes a minute is slow; one whose process is stopped is none."""
    settings = (f"parallel.data={ranks}", "data.global_batch_size=12", f"watchdog.timeout={_TIMEOUT}")
    save = ("checkpoint.save_every=5", "checkpoint.asynchronous=false")
    slow = Fault(rank, "megalemur.checkpoint.saver:write_checkpoint", 1, "sleep 60")
    with launched(tiny_run(trial.directory, *settings, *_RUN, *save, num_layers=2), slow) as run:
        run.wait_for_step(5)
        time.sleep(trial.chance.uniform(0.5, 2 * _TIMEOUT))
        os.kill(run.worker(rank), signal.SIGSTOP)
        began = time.monotonic()
        codes = run.codes()
        took = time.monotonic() - began
        assert codes == [exit_codes.HANG] * ranks and took < _TIMEOUT + 5, (codes, took, run.output())
        assert wait_for(run.living, lambda living: not living, seconds=5) == []
        named = [line for line in run.output().splitlines() if line.startswith("  rank ")]
        assert named and all(line.startswith(f"  rank {rank} (") for line in named), (named, rank)
    return "stopped in a save"


CAMPAIGN = Campaign(
    target=200,
    what="a rank that is stopped, loops or blocks at a random step and place, or is stopped in a save; "
    "1 to 3 ranks, behind 4 to 28 clean steps",
    passes=f"code {exit_codes.HANG} within watchdog.timeout + 5 s, that rank alone is named, nothing is left running",
    prepare=lambda directory: directory,
    trial=trial,
)
