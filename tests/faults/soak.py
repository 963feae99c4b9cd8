"""A long run in which something breaks every ten steps or so and that is only ever started again: the same final state.

Started again by a loop, as a scheduler does, whatever the exit code was. Goodput is the time of the undisturbed run
over that of this one.
"""

import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import NamedTuple

from megalemur.checkpoint.directory import checkpoint_directories
from megalemur.cli import exit_codes
from megalemur.supervise.process import descendants
from tests.faults.campaign import Campaign, Trial
from tests.faults.damage import damage
from tests.faults.resume_other_layout import refuse_other_state
from tests.faults.resume_same_layout import read_losses
from tests.faults.runs import (
    BIG,
    LAYOUTS,
    PATIENCE,
    finish,
    kill_group,
    launch,
    process_of,
    steps_logged,
    world,
    write_run,
)
from tests.support.injections import environment
from tests.support.launched import is_running, wait_for

STEPS = 1000
_LAYOUT = "dp2"
_SETTINGS = (
    *LAYOUTS[_LAYOUT],
    f"run.steps={STEPS}",
    "checkpoint.save_every=3",
    "checkpoint.keep=3",
    "watchdog.timeout=10",
    "run.collective_timeout=60",
)
_CODES = {
    "rank killed": exit_codes.RANK_DIED,
    "supervisor killed": exit_codes.RANK_DIED,
    "launcher killed": -signal.SIGKILL,
    "everything killed": -signal.SIGKILL,
    "asked to stop": exit_codes.REQUEUE,
    "rank stopped": exit_codes.HANG,
    "death in a save": exit_codes.RANK_DIED,
    "newest checkpoint damaged": exit_codes.REQUEUE,
}
"""Faults, and how a run that meets one ends. Damage is done between two runs, the first of which is asked to stop."""


class Undisturbed(NamedTuple):
    """The run that meets nothing."""

    directory: Path
    seconds: float


def prepare(directory: Path) -> Undisturbed:
    """Run it."""
    began = time.monotonic()
    finish(_LAYOUT, write_run(directory, *_SETTINGS, **BIG))
    return Undisturbed(directory, time.monotonic() - began)


def trial(whole: Undisturbed, trial: Trial) -> str:
    """The same run, broken again and again."""
    run_file, faults = write_run(trial.directory, *_SETTINGS, **BIG), Counter[str]()
    began = time.monotonic()
    while not (trial.directory / f"checkpoints/step_{STEPS:06d}").exists():
        fault = trial.chance.choice(list(_CODES))
        code = _leg(run_file, fault, trial.chance)
        said = run_file.with_suffix(".log").read_text()[-2000:]
        assert code in (_CODES[fault], exit_codes.DONE), (fault, code, said)
        faults[fault if code else "none: it was done"] += 1
        if fault == "newest checkpoint damaged":
            newest = checkpoint_directories(trial.directory / "checkpoints")[0]
            damage(trial.chance.choice([file for file in newest.rglob("*") if file.is_file()]), trial.chance)
    seconds = time.monotonic() - began
    assert read_losses(trial.directory) == read_losses(whole.directory)
    final = f"checkpoints/step_{STEPS:06d}"
    refuse_other_state(whole.directory / final, trial.directory / final)
    listed = ", ".join(f"{name} {count}" for name, count in sorted(faults.items()))
    return (
        f"{STEPS} steps, {faults.total()} runs ({listed}), goodput {whole.seconds / seconds:.0%} of an undisturbed run"
    )


def _leg(run_file: Path, fault: str, chance: Random) -> int:
    """Start it, break it, and wait until everything is gone; the launcher's exit code."""
    directory = run_file.parent
    injected = {}
    if fault == "death in a save":
        injected = environment("die", rank=chance.randrange(2), effect=chance.randint(20, 120), behind=False)
    before = steps_logged(directory)
    process = launch(world(_LAYOUT), run_file, **injected)
    try:
        wanted = before + chance.randint(6, 14)
        while steps_logged(directory) < wanted and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        everyone = [process.pid, *descendants(process.pid)]
        if process.poll() is None and not injected:
            _break(process, everyone, fault, chance)
        code = process.wait(PATIENCE)
        wait_for(lambda: [pid for pid in everyone if is_running(pid)], lambda living: not living, seconds=15)
        return code
    finally:
        if process.poll() is None:
            kill_group(process)


def _break(process: "subprocess.Popen[str]", everyone: list[int], fault: str, chance: Random) -> None:
    worker, supervisor = process_of(everyone, chance.randrange(2))
    if fault in ("launcher killed", "everything killed"):
        for pid in everyone if fault == "everything killed" else [process.pid]:
            os.kill(pid, signal.SIGKILL)
    elif fault in ("rank killed", "supervisor killed"):
        os.kill(worker if fault == "rank killed" else supervisor, signal.SIGKILL)
    elif fault == "rank stopped":
        os.kill(worker, signal.SIGSTOP)
    else:
        process.send_signal(chance.choice([signal.SIGTERM, signal.SIGUSR1]))


CAMPAIGN = Campaign(
    target=1,
    what=f"a soak: {STEPS:,} steps on 2 ranks of the launcher; every ten steps or so a rank, its supervisor, the "
    "launcher or all are killed, a rank is stopped or dies in a save, the run is asked to stop, the newest checkpoint "
    "is damaged; started again whatever it ended with",
    passes="the exit code of that fault; in the end losses, masters and moments of the undisturbed run, to the bit; "
    "goodput: seconds of that run over seconds of this one",
    prepare=prepare,
    trial=trial,
    real_every=1,
)
