"""Conversions that are killed and gone on with: nothing half-made has the destination's name, and no byte differs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints_tools import mover
from checkpoints_tools.certificate import NAME
from checkpoints_tools.conversion import Request, convert
from checkpoints_tools.errors import ConversionError
from checkpoints_tools.formats import open_any
from checkpoints_tools.layout import Options
from megalemur.checkpoint import disk
from megalemur.model.names import hf_shapes
from tests.faults.campaign import Campaign, Trial
from tests.faults.runs import BIG, ROOT
from tests.support.ranks import run_ranks
from tests.support.tiny import write_llama
from tests.unit.checkpoint.small import EFFECTS, in_a_child, kill_at_effect

FORMATS = ("megalemur", "hf", "megatron", "megatron-legacy")
_SHARDS = Options(max_shard_bytes=40_000)


class Shared(NamedTuple):
    """A small model and a large one."""

    directory: Path
    counts: dict[str, tuple[int, int]]
    """Format to effects on the disk and writes of rows of an undisturbed conversion of the small one."""


def prepare(directory: Path) -> Shared:
    """The sources, and undisturbed conversions of the small one."""
    write_llama(directory / "small", dtype=torch.bfloat16, num_layers=3)
    counts = {}
    for name in FORMATS:
        (counts[name],) = run_ranks(1, counted, directory / "small", directory / f"whole-{name}", name)
    return Shared(directory, counts)


def counted(source: Path, destination: Path, name: str) -> tuple[int, int]:
    """Convert; how many effects on the disk there were, and writes of rows."""
    effects: list[None] = []
    writes: list[None] = []
    for effect in EFFECTS:
        _wrap(disk, effect, effects)
    _wrap(mover, "write_at", writes)
    small(source, destination, name, resume=False)
    return len(effects), len(writes)


def _wrap(module: Any, name: str, calls: list[None]) -> None:
    original = getattr(module, name)

    def wrapped(*arguments: Any) -> Any:
        calls.append(None)
        return original(*arguments)

    setattr(module, name, wrapped)


def small(source: Path, destination: Path, name: str, *, resume: bool) -> None:
    """The conversion that is tried."""
    opened = open_any(source)
    convert(opened, opened, Request(destination, name, _SHARDS, workers=2, resume=resume))


def killed(source: Path, destination: Path, name: str, effect: int, write: int, torn: bool) -> int:
    """Convert in a process that ends itself at an effect on the disk, or at a write of rows, which may be torn."""

    def work() -> None:
        if effect:
            kill_at_effect(effect)
        else:
            _kill_at_write(write, torn)
        small(source, destination, name, resume=(destination.with_name(f"{destination.name}.converting")).exists())

    return in_a_child(work)


def _kill_at_write(number: int, torn: bool) -> None:
    original, left = mover.write_at, number

    def write(file: int, data: Any, offset: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            if torn:
                original(file, memoryview(data)[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        original(file, data, offset)

    mover.write_at = write


def same_bytes(one: Path, other: Path) -> None:
    """Every file but the certificate, which names its folder's source and nothing of its own."""
    files = {file.relative_to(one) for file in one.rglob("*") if file.is_file()}
    assert files == {file.relative_to(other) for file in other.rglob("*") if file.is_file()}
    for file in files - {Path(NAME)}:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def trial(shared: Shared, trial: Trial) -> str:
    """A few kills, then a run that nobody disturbs."""
    return _commands(shared, trial) if trial.real else _forked(shared, trial)


def _forked(shared: Shared, trial: Trial) -> str:
    chance, name, destination = trial.chance, trial.chance.choice(FORMATS), trial.directory / "out"
    kills = 0
    for _ in range(chance.randint(1, 3)):
        by_write = chance.random() < 0.5
        number = chance.randint(1, shared.counts[name][by_write])
        where = (0, number, chance.random() < 0.5) if by_write else (number, 0, False)
        (code,) = run_ranks(1, killed, shared.directory / "small", destination, name, *where)
        refuse_half(destination, ended=code == 0)
        if destination.exists():
            break
        kills += 1
    if not destination.exists():
        small(shared.directory / "small", destination, name, resume=_draft(destination).exists())
    same_bytes(shared.directory / f"whole-{name}", destination)
    return f"{name}, {kills} kills"


def _draft(destination: Path) -> Path:
    return destination.with_name(f"{destination.name}.converting")


def refuse_half(destination: Path, *, ended: bool) -> None:
    """The destination has its name only when it is whole, and what was left beside it is no checkpoint."""
    assert destination.exists() or not ended
    if destination.exists():
        assert (destination / NAME).exists()
        opened = open_any(destination)
        shapes = hf_shapes(opened.model)
        for key in opened.dtypes:
            mover.digest_of(opened, key, shapes[key.name], lambda count: None)
    if _draft(destination).exists():
        try:
            open_any(_draft(destination))
        except ConversionError:
            return
        raise AssertionError(f"{_draft(destination)} passes for a checkpoint")


def _commands(shared: Shared, trial: Trial) -> str:
    """The command itself, on a model of 50 MB, killed at a random time."""
    large, whole = shared.directory / "large", shared.directory / "whole-large"
    if not whole.exists():
        write_llama(large, **{**BIG, "vocab_size": 16384})
        assert _command(large, whole).wait(300) == 0
    destination, kills = trial.directory / "out", 0
    while not destination.exists():
        process = _command(large, destination, *(["--resume"] if _draft(destination).exists() else []))
        if kills < 3:
            while not (_draft(destination) / "lock").exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(trial.chance.uniform(0, 0.3))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        else:
            assert process.wait(300) == 0
        refuse_half(destination, ended=process.returncode == 0)
    same_bytes(whole, destination)
    return f"the command, {kills} kills"


def _command(source: Path, destination: Path, *options: str) -> "subprocess.Popen[bytes]":
    arguments = [str(source), str(destination), "--to", "megalemur", "--max-shard-size", "5MB", *options]
    command = [sys.executable, str(ROOT / "checkpoints_tools/convert.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)


CAMPAIGN = Campaign(
    target=100,
    what="kill -9 of a conversion, up to three times, at any write (also torn) or effect on the disk, then --resume; "
    "real: the command on a model of 60 MB at random times",
    passes="the destination has its name only when it is whole and certified, and the bytes of an undisturbed one",
    prepare=prepare,
    trial=trial,
)
