"""Disks that are full or fail under a save: the last good checkpoint stays, all ranks agree, nothing hangs.

Full disks are small tmpfs mounts, which need root; without it every fault is injected into the effects of disk.py.
"""

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from megalemur.checkpoint import disk
from megalemur.checkpoint.directory import newest_checkpoint, step_of, verify_checkpoint
from megalemur.checkpoint.errors import CheckpointError
from megalemur.cli import exit_codes
from megalemur.config.run import RunConfig
from megalemur.supervise.signals import StopRequest
from megalemur.train.loop import run_loop
from tests.faults.campaign import Campaign, Trial
from tests.faults.runs import BIG, launch, write_run
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run
from tests.support.training import start

STEPS = 6
_HANG_SECONDS = 30
_LAYOUTS = {
    1: ((),),
    2: (("parallel.tensor=2",), ("parallel.pipeline=2",), ("parallel.data=2",)),
    3: (("parallel.data=3", "data.global_batch_size=6"),),
}


class Failing(NamedTuple):
    """Calls of effects on one rank's disk that end with an error."""

    rank: int
    effect: str
    """A function of checkpoint/disk.py; the empty word is none."""
    first: int
    count: int
    number: int
    """errno."""

    def install(self) -> None:
        """In the process that is to have it."""
        original: Callable[..., Any] = getattr(disk, self.effect)
        calls = 0

        def effect(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if self.first <= calls < self.first + self.count:
                raise OSError(self.number, os.strerror(self.number))
            return original(*arguments)

        setattr(disk, self.effect, effect)


class Outcome(NamedTuple):
    """How a rank's run went."""

    step: int
    error: str
    saved: int | None
    """Step of the newest checkpoint that the run says stands."""
    seconds: float
    failed: int
    """Saves that failed, as this rank counted when it ended."""


@contextmanager
def small_disk(directory: Path, megabytes: float) -> Iterator[Path]:
    """A tmpfs of this size."""
    directory.mkdir()
    size = f"size={int(megabytes * 1024)}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(directory)], check=True, capture_output=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


@cache
def may_mount(directory: Path) -> bool:
    """Whether this process may make small disks."""
    try:
        with small_disk(directory / "probe", 1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def train(config: RunConfig, failing: Failing | None) -> Outcome:
    """The run's own loop on one rank."""
    run = start(config)
    if failing is not None and failing.rank == run.place.rank:
        failing.install()
    began, error = time.monotonic(), ""
    try:
        with StopRequest() as stop:
            run_loop(run, [], stop)
    except CheckpointError as caught:
        error = str(caught)
    seconds = time.monotonic() - began
    return Outcome(run.state.step, error, run.saver.saved_step, seconds, run.saver.failed_in_a_row)


def last_good(root: Path) -> int:
    """Step of the newest checkpoint, every byte of it read; 0 where there is none."""
    newest = newest_checkpoint(root).path
    if newest is None:
        return 0
    verify_checkpoint(newest)
    return step_of(newest) or 0


def refuse_disagreement(ranks: list[Outcome], root: Path) -> None:
    """All ranks alike, in time, and the last checkpoint that was promised is there."""
    for rank, outcome in enumerate(ranks):
        assert outcome.seconds < _HANG_SECONDS, f"rank {rank} took {outcome.seconds:.0f} s"
        assert outcome[:3] == ranks[0][:3], ranks
    step, error, saved = ranks[0][:3]
    assert error or (step, saved) == (STEPS, STEPS), ranks
    # the save that was in flight when the limit was reached may stand yet
    assert not error or ranks[0].failed or saved == step, ranks
    assert last_good(root) >= (saved or 0), f"step {saved} was promised, {last_good(root)} is there"


def _settings(chance: Random, ranks: int) -> tuple[str, ...]:
    background = chance.choice(("true", "false"))
    saves = (f"checkpoint.asynchronous={background}", "checkpoint.save_every=1", "checkpoint.max_failed_saves=2")
    return (*chance.choice(_LAYOUTS[ranks]), *saves, f"run.stop_at={STEPS}", f"checkpoint.keep={chance.choice((0, 1))}")


def trial(directory: Path, trial: Trial) -> str:
    """A full disk or failing effects under one run."""
    chance, can_mount = trial.chance, may_mount(directory)
    if trial.real:
        return _launched(trial, can_mount)
    ranks = chance.randint(1, 3)
    settings = _settings(chance, ranks)
    if can_mount and chance.random() < 0.3:
        with small_disk(trial.directory / "disk", chance.uniform(0.5, 10)) as disk_directory:
            root = disk_directory / "checkpoints"
            config = tiny_run(trial.directory, *settings, f"checkpoint.directory={root}", num_layers=2)
            told = run_ranks(ranks, train, config, None, timeout=120)
            refuse_disagreement(told, root)
        return f"tmpfs full, {ranks} ranks: {_end(told[0])}"
    config = tiny_run(trial.directory, *settings, num_layers=2)
    effect = chance.choice(("make_directory", "create", "write", "sync", "close", "sync_directory", "rename"))
    number = chance.choice((errno.ENOSPC, errno.EIO))
    failing = Failing(chance.randrange(ranks), effect, chance.randint(1, 40), chance.choice((1, 3, 10_000)), number)
    told = run_ranks(ranks, train, config, failing, timeout=120)
    refuse_disagreement(told, config.checkpoint.directory)
    return f"{errno.errorcode[number]}, {ranks} ranks: {_end(told[0])}"


def _end(outcome: Outcome) -> str:
    return "stopped" if outcome.error else "went on to its end"


def _launched(trial: Trial, can_mount: bool) -> str:
    """A state of 80 MB on a disk that holds one, two or three of them."""
    chance = trial.chance
    if not can_mount:
        return "none launched: no right to mount a tmpfs"
    ranks, megabytes = chance.randint(1, 2), chance.uniform(60, 320)
    with small_disk(trial.directory / "disk", megabytes) as disk_directory:
        root = disk_directory / "checkpoints"
        settings = (*_settings(chance, ranks), f"checkpoint.directory={root}")
        run_file = write_run(trial.directory, *settings, **BIG)
        code = launch(ranks, run_file).wait(300)
        said = run_file.with_suffix(".log").read_text()
        good = last_good(root)
        assert code in (exit_codes.DONE, exit_codes.NO_GOOD_CHECKPOINT), f"exit code {code}: {said[-2000:]}"
        assert (code == exit_codes.DONE) == (good == STEPS), f"exit code {code}, step {good}: {said[-2000:]}"
        assert code == exit_codes.DONE or "No space left on device" in said, said[-2000:]
    return f"launched on a full tmpfs: {'stopped' if code else 'went on to its end'}"


CAMPAIGN = Campaign(
    target=200,
    what="a small tmpfs that fills up, or ENOSPC and EIO from some calls of one rank's disk, 1 to 3 ranks, plain and "
    "background saves",
    passes="the last good checkpoint verifies, all ranks end at one step with one message or go on, within 30 s",
    prepare=lambda directory: directory,
    trial=trial,
)
