"""kill -9 of a rank, a supervisor, everything or the launcher at random moments of plain and background saves."""

import os
import re
import signal
import time
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from megalemur.checkpoint.directory import checkpoint_directories, newest_checkpoint, step_of, verify_checkpoint
from megalemur.supervise.process import descendants
from tests.faults.campaign import Campaign, Trial
from tests.faults.resume_same_layout import read_losses
from tests.faults.runs import BIG, LAYOUTS, PATIENCE, finish, kill_group, launch, world, write_run
from tests.support.launched import Launched, is_running, launched, wait_for
from tests.support.tiny import tiny_run

EVERY, STEPS = 2, 8
LENGTH = ("run.steps=20", "schedule.warmup_steps=3", f"run.stop_at={STEPS}")
_LAYOUTS = tuple(name for name in LAYOUTS if world(name) <= 4)
_SMALL = {"num_layers": 4}
_RESUMED = re.compile(r"resuming (\S+/step_\d{6,}), at step (\d+)")


class Reference:
    """Losses of runs that nobody disturbs, made when first asked for."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.losses = cache(self._losses)

    def _losses(self, layout: str, large: bool) -> dict[int, tuple[float, float]]:
        directory = self.directory / f"{layout.replace(' ', '-')}-{large}"
        directory.mkdir()
        if large:
            finish(layout, write_run(directory, *LAYOUTS[layout], *LENGTH, **BIG))
        else:
            with launched(tiny_run(directory, *LAYOUTS[layout], *LENGTH, **_SMALL)) as run:
                assert set(run.codes()) == {0}, run.output()
        return read_losses(directory)


def phase(root: Path) -> str:
    """How far a save had come, as the directory shows it."""
    drafts = list(root.glob("step_*.tmp-*"))
    if any((draft / "manifest.json").exists() and (draft / "manifest.json").stat().st_size for draft in drafts):
        return "manifest written, not renamed"
    if any((draft / "trainer/state.json").exists() for draft in drafts):
        return "small files written, no manifest"
    if any(list((draft / "trainer").glob("*")) for draft in drafts):
        return "tensors being written"
    if drafts:
        return "folder made"
    return "between saves" if checkpoint_directories(root) else "before the first save"


def wait_for_moment(root: Path, chance: Random, alive: Any) -> None:
    """A random moment: in the save of a random step, half of the time, else anywhere behind the one before it."""
    step = EVERY * chance.randint(1, STEPS // EVERY - 1)
    begun = f"step_{step:06d}*"
    deadline = time.monotonic() + PATIENCE
    while not any(root.glob(begun)):
        assert alive() and time.monotonic() < deadline, f"step {step} was never saved"
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.05) if chance.random() < 0.5 else chance.uniform(0, 0.5))


def kill_small(run: Launched, chance: Random) -> str:
    """One process or all; waits until the others have gone too."""
    ranks = len(run.processes)
    whom, rank = chance.choice(("a rank", "a supervisor", "all")), chance.randrange(ranks)
    everyone = {pid for process in run.processes for pid in (process.pid, *descendants(process.pid))}
    targets = {
        "a rank": descendants(run.supervisor(rank)),
        "a supervisor": [run.supervisor(rank)],
        "all": sorted(everyone),
    }
    for pid in targets[whom]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # its supervisor was faster
    wait_for(lambda: [pid for pid in everyone if is_running(pid)], lambda living: not living, run.output, 60)
    return whom


def judge_directory(directory: Path) -> tuple[int, int]:
    """(last step that was logged, step of what a resume must find), every byte of that one read."""
    root = directory / "checkpoints"
    newest = newest_checkpoint(root).path
    if newest is not None:
        verify_checkpoint(newest)
    step = (step_of(newest) or 0) if newest else 0
    metrics = directory / "log/metrics.jsonl"
    logged = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    assert logged - step <= 2 * EVERY, f"{logged} steps were made, {step} are left: more than an interval and a save"
    return logged, step


def judge_end(directory: Path, said: str, step: int, expected: dict[int, tuple[float, float]], exact: bool) -> None:
    """It resumed from the newest, and went on as if nothing had happened."""
    resumed = {(Path(path).name, int(at)) for path, at in _RESUMED.findall(said)}
    assert resumed == ({(f"step_{step:06d}", step)} if step else set()), (resumed, step, said[-2000:])
    root = directory / "checkpoints"
    assert newest_checkpoint(root).path == root / f"step_{STEPS:06d}"
    for path in checkpoint_directories(root):
        verify_checkpoint(path)
    found = read_losses(directory)
    assert found.keys() == expected.keys(), sorted(found)
    for number, (loss, norm) in expected.items():
        if exact:
            assert found[number] == (loss, norm), f"step {number}: {found[number]}, undisturbed {(loss, norm)}"
        else:  # sums in another order: the last digits of fp32
            assert abs(found[number][0] - loss) <= 1e-4 * abs(loss), f"step {number}: {found[number][0]}, {loss}"


def trial(reference: Reference, trial: Trial) -> str:
    """One kill, one resume, in the same layout or another one."""
    chance = trial.chance
    layouts = [name for name in _LAYOUTS if world(name) <= 2] if trial.real else list(_LAYOUTS)
    first = chance.choice(layouts)
    second = first if chance.random() < 0.5 else chance.choice(layouts)
    background = chance.choice(("true", "false"))
    settings = (*LENGTH, f"checkpoint.save_every={EVERY}", f"checkpoint.asynchronous={background}")
    expected, root = reference.losses(first, trial.real), trial.directory / "checkpoints"
    kill = _kill_launched if trial.real else _kill_forked
    whom, hit = kill(trial, first, settings, root)
    _, step = judge_directory(trial.directory)
    said = _resume(trial, second, settings)
    judge_end(trial.directory, said, step, expected, first == second)
    return f"{whom} killed, {'background' if background == 'true' else 'plain'}, {hit}"


def _kill_forked(trial: Trial, layout: str, settings: tuple[str, ...], root: Path) -> tuple[str, str]:
    with launched(tiny_run(trial.directory, *LAYOUTS[layout], *settings, **_SMALL)) as run:
        wait_for_moment(root, trial.chance, lambda: all(process.is_alive() for process in run.processes))
        whom = kill_small(run, trial.chance)
    return whom, phase(root)


def _kill_launched(trial: Trial, layout: str, settings: tuple[str, ...], root: Path) -> tuple[str, str]:
    process = launch(world(layout), write_run(trial.directory, *LAYOUTS[layout], *settings, **BIG))
    try:
        wait_for_moment(root, trial.chance, lambda: process.poll() is None)
        everyone = descendants(process.pid)
        whom = trial.chance.choice(("the launcher", "all"))
        if whom == "all":
            for pid in everyone:
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        wait_for(lambda: [pid for pid in everyone if is_running(pid)], lambda living: not living, seconds=60)
    finally:
        if process.poll() is None:
            kill_group(process)
    return f"launched: {whom}", phase(root)


def _resume(trial: Trial, layout: str, settings: tuple[str, ...]) -> str:
    """To the end; what the second run said."""
    if trial.real:
        return finish(layout, write_run(trial.directory, *LAYOUTS[layout], *settings, **BIG))
    for output in trial.directory.glob("output-*.txt"):
        output.unlink()
    with launched(tiny_run(trial.directory, *LAYOUTS[layout], *settings, **_SMALL)) as run:
        assert set(run.codes(PATIENCE)) == {0}, run.output()
        return run.output()


CAMPAIGN = Campaign(
    target=1000,
    what="kill -9 of one rank, one supervisor, all or the launcher at random moments of plain and background saves, "
    "1 to 4 gloo ranks, resumed in the same layout or another",
    passes=f"resumed from the newest checkpoint, which verifies in full; at most an interval of {EVERY} steps "
    "and the save in flight lost; the losses of an undisturbed run, to the bit where the layout stayed",
    prepare=Reference,
    trial=trial,
)
