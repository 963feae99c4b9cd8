"""Damage to any file of the newest of two checkpoints: named, passed over, and the older one loaded to the bit."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from megalemur.checkpoint.errors import DamagedCheckpoint
from megalemur.checkpoint.load import load_pieces
from megalemur.checkpoint.search import Search
from megalemur.config.run import RunConfig
from megalemur.parallel.state import KINDS, Piece, whole
from megalemur.train.saving import save_run
from tests.faults.campaign import Campaign, Trial
from tests.faults.runs import BIG, state_digest
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run
from tests.support.training import start, take_steps, whole_state

OLDER, NEWEST = "step_000001", "step_000002"
_BLOCK = 4096


class Step(NamedTuple):
    """What a rank holds, and what it makes of the next step."""

    state: str
    """Digest."""
    loss_and_norm: tuple[float, float]


class Written:
    """Two checkpoints of a small run, and of a large one once a trial asks for it."""

    def __init__(self, directory: Path):
        self.small, self.large = directory / "small", directory / "large"
        self.small.mkdir()
        run_ranks(1, save_twice, tiny_run(self.small, num_layers=1))
        self.state = whole_state(self.small / "checkpoints" / OLDER)
        self._steps: list[Step] = []

    def steps(self) -> list[Step]:
        """Of the large run on each rank, behind the older checkpoint."""
        if not self._steps:
            self.large.mkdir()
            self._steps = run_ranks(2, save_twice, large_run(self.large), timeout=300)
        return self._steps


def large_run(directory: Path) -> RunConfig:
    """Of two ranks."""
    return tiny_run(directory, "parallel.tensor=2", **BIG)


def save_twice(config: RunConfig) -> Step:
    """Behind steps 1 and 2."""
    run = start(config)
    take_steps(run, 1)
    save_run(run)
    state = state_digest(run)
    (second,) = take_steps(run, 2)
    save_run(run)
    return Step(state, second)


def link_tree(source: Path, target: Path) -> None:
    """The checkpoints again, as hard links."""
    shutil.copytree(source, target, copy_function=os.link)


def damage(path: Path, chance: Random) -> str:
    """Harm a file that shares its bytes with nobody afterwards; says how."""
    data = bytearray(path.read_bytes())
    before, kind = bytes(data), chance.choice(("bit flipped", "cut", "block zeroed"))
    at = chance.randrange(len(data))
    if kind == "cut":
        del data[at:]
    elif kind == "block zeroed":
        stop = min(len(data), at + chance.choice((1, 512, _BLOCK)))
        data[at:stop] = bytes(stop - at)
    if bytes(data) == before:  # a bit to flip, or there were zeros already
        kind = "bit flipped"
        data[at] ^= 1 << chance.randrange(8)
    path.unlink()
    path.write_bytes(data)
    return kind


def load_newest(root: Path) -> tuple[Path, list[Piece], list[DamagedCheckpoint]]:
    """The newest that loads in full, its state, and what was passed over."""
    search = Search(root)
    while (reader := search.next()) is not None:
        shapes = reader.shapes
        pieces = [
            Piece(name, kind, shape, whole(shape), torch.full(shape, torch.nan))
            for name, shape in shapes.items()
            for kind in KINDS
        ]
        try:
            load_pieces(reader, pieces, shapes=shapes)
        except DamagedCheckpoint as error:
            search.pass_over(reader, error)
        else:
            return reader.path, pieces, search.passed_over
    raise AssertionError("nothing was loaded")


def begin_and_step(config: RunConfig) -> tuple[str, Step, list[str]]:
    """(what was resumed, what it holds and makes, warnings) of a rank of a run that starts."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megalemur").addHandler(handler)
    run = start(config)
    assert run.origin.reader is not None
    state = state_digest(run)
    (result,) = take_steps(run, 2)
    return run.origin.reader.path.name, Step(state, result), said


def _kind_of(name: str) -> str:
    """The part of a checkpoint that a file is."""
    tensors = name.endswith(".safetensors")
    return {(True, True): "masters and moments", (True, False): "weights"}.get((tensors, "/" in name), name)


def _files(path: Path) -> Iterator[Path]:
    yield from sorted(file for file in path.rglob("*") if file.is_file())


def trial(written: Written, trial: Trial) -> str:
    """Damage one file, load."""
    chance, root = trial.chance, trial.directory / "checkpoints"
    expected = written.steps() if trial.real else []
    link_tree((written.large if trial.real else written.small) / "checkpoints", root)
    victim = chance.choice(list(_files(root / NEWEST)))
    name, how = str(victim.relative_to(root / NEWEST)), damage(victim, chance)
    if trial.real:
        ranks = run_ranks(2, begin_and_step, large_run(trial.directory), timeout=300)
        for (resumed, step, said), wanted in zip(ranks, expected, strict=True):
            assert (resumed, step) == (OLDER, wanted), f"{name}, {how}: {resumed}"
            assert any("passed over" in line and name in line for line in said), f"{name}, {how}: {said}"
        return f"{_kind_of(name)} of 80 MB on 2 forked ranks"
    path, pieces, passed_over = load_newest(root)
    assert path.name == OLDER, f"{name}, {how}: not found"
    assert [str(error.path) for error in passed_over] == [str(victim)], f"{name}, {how}: {passed_over}"
    for piece in pieces:
        assert torch.equal(piece.tensor, written.state[f"{piece.kind}/{piece.name}"]), piece.name
    return f"{_kind_of(name)}: {how}"


CAMPAIGN = Campaign(
    target=10_000,
    what="a bit flipped, a file cut, a block zeroed, in any file of the newest of two checkpoints",
    passes="the file named before a step is taken, the older checkpoint loaded to the bit; a tenth of the trials: "
    "80 MB, read by 2 forked ranks, not by the launcher",
    prepare=Written,
    trial=trial,
)
