"""Resume in the same layout, behind every step of 1 to 20: the next fifty are those of a run that never stopped."""

import time
from functools import cache
from pathlib import Path

import orjson

from tests.faults.campaign import Campaign, Trial
from tests.faults.runs import (
    BIG,
    LAYOUTS,
    PATIENCE,
    Seen,
    finish,
    kill_group,
    launch,
    steps_to_the_bit,
    world,
    write_run,
)
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run

CHOSEN = tuple(LAYOUTS)[:8]
STEPS, MORE = 20, 50
_LENGTH = ("run.steps=80", "schedule.warmup_steps=3")


class Reference:
    """Runs that nobody interrupts, one a layout, made when first asked for."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.seen = cache(self._seen)
        self.losses = cache(self._losses)

    def _seen(self, layout: str) -> list[list[Seen]]:
        config = tiny_run(self.directory, *LAYOUTS[layout], *_LENGTH)
        return run_ranks(world(layout), steps_to_the_bit, config, STEPS + MORE, timeout=PATIENCE)

    def _losses(self, layout: str) -> dict[int, tuple[float, float]]:
        directory = self.directory / layout.replace(" ", "-")
        directory.mkdir()
        run_file = write_run(directory, *LAYOUTS[layout], *_LENGTH, f"run.stop_at={STEPS + MORE}", **BIG)
        finish(layout, run_file)
        return read_losses(directory)


def read_losses(directory: Path) -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) of each step, of the last time that it was made."""
    lines = map(orjson.loads, (directory / "log/metrics.jsonl").read_bytes().splitlines())
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "event" not in line}


def trial(reference: Reference, trial: Trial) -> str:
    """Interrupt behind a step, resume, compare every bit of the next steps."""
    step, layout = trial.number % STEPS + 1, CHOSEN[trial.number // STEPS % len(CHOSEN)]
    if trial.real:
        small = trial.chance.choice([name for name in CHOSEN if world(name) <= 2])
        _killed(reference, trial, small, step)
        return f"SIGKILL, {small}"
    save = f"checkpoint.directory={trial.directory}"
    config = tiny_run(reference.directory, *LAYOUTS[layout], *_LENGTH, save)
    begun = run_ranks(world(layout), steps_to_the_bit, config, step, step, timeout=PATIENCE)
    ended = run_ranks(world(layout), steps_to_the_bit, config, step + MORE, timeout=PATIENCE)
    for rank, whole in enumerate(reference.seen(layout)):
        assert begun[rank] + ended[rank] == whole[: step + MORE], f"rank {rank}, {layout}, step {step}"
    return layout


def _killed(reference: Reference, trial: Trial, layout: str, step: int) -> None:
    """Through the launcher: killed somewhere behind the checkpoint of the step, started again."""
    expected = reference.losses(layout)
    stop = ("run.steps=80", "schedule.warmup_steps=3", f"run.stop_at={STEPS + MORE}")
    run_file = write_run(trial.directory, *LAYOUTS[layout], *stop, f"checkpoint.save_every={step}", **BIG)
    process = launch(world(layout), run_file)
    checkpoint = trial.directory / "checkpoints" / f"step_{step:06d}"
    while not checkpoint.exists():
        assert process.poll() is None, run_file.with_suffix(".log").read_text()[-2000:]
        time.sleep(0.05)
    time.sleep(trial.chance.uniform(0, 2))
    kill_group(process)
    finish(layout, run_file)
    found = read_losses(trial.directory)
    assert found == expected, {k: (found.get(k), expected[k]) for k in expected if found.get(k) != expected[k]}


CAMPAIGN = Campaign(
    target=len(CHOSEN) * STEPS,
    what=f"resume in the same layout, {len(CHOSEN)} layouts, behind every step of 1 to {STEPS}, and after SIGKILL",
    passes=f"{MORE} further steps: losses, norms, samples, masters and moments equal to the bit",
    prepare=Reference,
    trial=trial,
)
