"""NaN and infinity in a loss, an activation or one rank's gradient: skipped by all ranks, and no bit is changed."""

import math
from pathlib import Path

import orjson
import torch

from megalemur.train.guard import Verdict
from megalemur.train.step import train_step
from tests.faults.campaign import Campaign, Trial
from tests.faults.resume_same_layout import read_losses
from tests.faults.runs import BIG, LAYOUTS, finish, world, write_run
from tests.support.injections import environment
from tests.support.poison import bits, poison
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run
from tests.support.training import start, take_steps

_SMALL = [name for name in LAYOUTS if world(name) <= 4]


def skip(config, where: str, value: float, culprit: int, step: int) -> tuple[str, bool, list[tuple[float, float]]]:
    """(verdict of a poisoned step, whether a bit changed, losses and norms of the two steps behind it)."""
    run = start(config)
    take_steps(run, step)
    before = bits(run)
    handle = poison(run, where, value) if run.place.rank == culprit else None
    batches = run.data.training.micro_batches(run.state.samples, run.portion)
    result = train_step(run.engine, batches, 1e-3)
    if handle is not None:
        handle.remove()
    same = all(torch.equal(a, b) for a, b in zip(before, bits(run), strict=True))
    return result.verdict.name, same, take_steps(run, step + 2)


def clean(config, step: int) -> list[tuple[float, float]]:
    """The same two steps of a run that met nothing."""
    run = start(config)
    take_steps(run, step)
    return take_steps(run, step + 2)


def trial(_: Path, trial: Trial) -> str:
    """One poison at one step of one rank."""
    return _launched(trial) if trial.real else _forked(trial)


def _launched(trial: Trial) -> str:
    chance = trial.chance
    layout = chance.choice([name for name in _SMALL if world(name) == 2])
    where, value, step = chance.choice(["activation", "gradient", "loss"]), chance.choice(["nan", "inf"]), 3
    rank = 1 if where == "loss" else chance.randrange(2)
    dtype = chance.choice(["fp32", "bf16"])
    settings = (*LAYOUTS[layout], f"precision.dtype={dtype}", f"run.stop_at={step + 2}")
    run_file = write_run(trial.directory, *settings, **BIG)
    said = finish(layout, run_file, **environment("poison", rank=rank, step=step, where=where, value=value))
    assert f"step {step}" in said and "not finite, no parameter was changed" in said, said[-2000:]
    for each in range(2):
        seen = orjson.loads((trial.directory / "log" / f"same-{each}.json").read_bytes())
        assert seen == {"same": True, "skipped": True}, (layout, where, value, rank, each, seen)
    losses = read_losses(trial.directory)
    assert all(math.isfinite(losses[number][0]) for number in losses if number != step) and len(losses) == step + 2
    return f"launched: {value} in {where}, {dtype}"


def _forked(trial: Trial) -> str:
    chance = trial.chance
    layout = chance.choice(_SMALL)
    where = chance.choice(["activation", "gradient", "loss"])
    value = chance.choice([float("nan"), float("inf")])
    ranks = world(layout)
    culprit = ranks - 1 if where == "loss" else chance.randrange(ranks)
    step, dtype = chance.randrange(4), chance.choice(["fp32", "bf16"])
    settings = (*LAYOUTS[layout], f"precision.dtype={dtype}", "guard.rollback_after=100")
    config = tiny_run(trial.directory, *settings)
    found = run_ranks(ranks, skip, config, where, value, culprit, step, timeout=300)
    expected = run_ranks(ranks, clean, config, step, timeout=300)
    for (verdict, same, behind), wanted in zip(found, expected, strict=True):
        assert (verdict, same) == (Verdict.SKIP.name, True), (layout, where, value, culprit, found)
        assert behind == wanted, "the steps behind it are those of a run that met nothing"
    return f"{value} in {where}, {dtype}"


CAMPAIGN = Campaign(
    target=500,
    what="NaN or infinity in the loss, an activation or a gradient, at any rank, step and layout of up to 4 ranks",
    passes="all ranks skip the step, no bit of parameters, masters or moments changes, the next steps are those of a "
    "run that met nothing",
    prepare=lambda directory: directory,
    trial=trial,
)
