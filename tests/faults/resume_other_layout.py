"""Resume in another layout, every ordered pair of ten: no bit of the state differs, and the samples are the same."""

from functools import cache
from pathlib import Path

import torch

from megalemur.config.run import RunConfig
from megalemur.train.saving import save_run
from tests.faults.campaign import Campaign, Trial
from tests.faults.resume_same_layout import finish
from tests.faults.runs import BIG, LAYOUTS, world, write_run
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run
from tests.support.training import start, train_and_save, whole_state

STEPS = 3
PAIRS = [(one, other) for one in LAYOUTS for other in LAYOUTS if one != other]
Samples = list[list[int]]


class Written:
    """A checkpoint of each layout after three steps, made when first asked for."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.checkpoint = cache(self._checkpoint)

    def _checkpoint(self, layout: str) -> Path:
        config = tiny_run(self.directory, *LAYOUTS[layout], f"run.stop_at={STEPS}", self.where(layout))
        return run_ranks(world(layout), train_and_save, config, timeout=300)[0][1]

    def where(self, layout: str) -> str:
        """The setting that says where a layout's checkpoint lies."""
        return f"checkpoint.directory={self.directory / layout.replace(' ', '-')}"


def load_and_save(config: RunConfig, to: Path) -> tuple[Path, int, Samples]:
    """Resume and write what was loaded, without a step; (where, samples drawn, numbers of the next step's samples)."""
    run = start(config)
    checkpoint = config.checkpoint.model_copy(update={"directory": to})
    run.config = config.model_copy(update={"checkpoint": checkpoint})
    return save_run(run), run.state.samples, run.portion.sample_numbers(run.state.samples)


def refuse_other_state(one: Path, other: Path) -> None:
    """Compare two checkpoints' masters and moments."""
    before, after = whole_state(one), whole_state(other)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def trial(written: Written, trial: Trial) -> str:
    """Save in one layout, load in another, compare everything."""
    writer, reader = PAIRS[trial.number % len(PAIRS)]
    if trial.real:
        return _launched(trial)
    path = written.checkpoint(writer)
    config = tiny_run(written.directory, *LAYOUTS[reader], written.where(writer))
    ranks = run_ranks(world(reader), load_and_save, config, trial.directory / "again", timeout=300)
    refuse_other_state(path, ranks[0][0])
    drawn, batch = STEPS * config.data.global_batch_size, config.data.global_batch_size
    assert {samples for _, samples, _ in ranks} == {drawn}
    numbers = {number for _, _, batches in ranks for micro_batch in batches for number in micro_batch}
    assert numbers == set(range(drawn, drawn + batch))
    return f"to {reader}"


def _launched(trial: Trial) -> str:
    """Through the launcher, between layouts of at most two processes."""
    writer, reader = trial.chance.sample([name for name in LAYOUTS if world(name) <= 2], 2)
    common = ("run.steps=9", "schedule.warmup_steps=3", "checkpoint.keep=0")
    finish(writer, write_run(trial.directory, *LAYOUTS[writer], *common, "run.stop_at=3", **BIG))
    checkpoints = trial.directory / "checkpoints"
    run_file = write_run(trial.directory, *LAYOUTS[reader], *common, "run.stop_at=4", **BIG)
    finish(reader, run_file)
    assert [path.name for path in sorted(checkpoints.glob("step_*"))] == ["step_000003", "step_000004"]
    config = tiny_run(trial.directory, *LAYOUTS[reader], *common, **BIG)
    (checkpoints / "step_000004").rename(trial.directory / "step_000004")
    path = run_ranks(world(reader), load_and_save, config, trial.directory / "again", timeout=300)[0][0]
    refuse_other_state(checkpoints / "step_000003", path)
    return f"launched, to {reader}"


CAMPAIGN = Campaign(
    target=len(PAIRS),
    what=f"resume in another layout, all ordered pairs of {len(LAYOUTS)} layouts of at most 8 processes",
    passes="masters and moments equal to the bit, samples identical and in the same order",
    prepare=Written,
    trial=trial,
)
