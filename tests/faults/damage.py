"""Damage to any file of the newest of two checkpoints: named, passed over, and the older one loaded to the bit."""

import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

import torch

from megalemur.checkpoint.errors import DamagedCheckpoint
from megalemur.checkpoint.load import load_pieces
from megalemur.checkpoint.search import Search
from megalemur.config.run import RunConfig
from megalemur.parallel.state import KINDS, Piece, whole
from megalemur.train.saving import save_run
from tests.faults.campaign import Campaign, Trial
from tests.faults.resume_same_layout import read_losses
from tests.faults.runs import BIG, LAYOUTS, finish, write_run
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run
from tests.support.training import start, take_steps, whole_state

OLDER, NEWEST = "step_000001", "step_000002"
_AT_ONCE = 5
"""Checkpoints that are damaged for one launched run, all but the oldest."""
_LAYOUTS = ("one process", "one process", "tp2")
"""Of the launched trials; two ranks cost twice as much, and what they agree on is the same for all damage."""
_LAUNCHED = ("checkpoint.save_every=1", f"checkpoint.keep={_AT_ONCE + 1}")
_BLOCK = 4096


class Written:
    """Two checkpoints of a small run, and more of a large one once a trial asks for it."""

    def __init__(self, directory: Path):
        self.small, self._directory = directory / "small", directory
        self.small.mkdir()
        run_ranks(1, save_twice, tiny_run(self.small, num_layers=1))
        self.state = whole_state(self.small / "checkpoints" / OLDER)
        self.losses = cache(self._losses)

    def large(self, layout: str) -> Path:
        """Folder of the large run in a layout."""
        return self._directory / layout.replace(" ", "-")

    def _losses(self, layout: str) -> dict[int, tuple[float, float]]:
        """Of each step of the large run, which nobody disturbs."""
        directory = self.large(layout)
        directory.mkdir()
        finish(layout, write_run(directory, *LAYOUTS[layout], *_LAUNCHED, f"run.stop_at={_AT_ONCE + 1}", **BIG))
        return read_losses(directory)


def save_twice(config: RunConfig) -> None:
    """Behind steps 1 and 2."""
    run = start(config)
    for step in (1, 2):
        take_steps(run, step)
        save_run(run)


def link_tree(source: Path, target: Path) -> None:
    """The checkpoints again, as hard links; not the record of starts, to which each run appends."""
    shutil.copytree(source, target, copy_function=os.link, ignore=shutil.ignore_patterns("starts.jsonl"))


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


def _kind_of(name: str) -> str:
    """The part of a checkpoint that a file is."""
    tensors = name.endswith(".safetensors")
    return {(True, True): "masters and moments", (True, False): "weights"}.get((tensors, "/" in name), name)


def _files(path: Path) -> Iterator[Path]:
    yield from sorted(file for file in path.rglob("*") if file.is_file())


def trial(written: Written, trial: Trial) -> str | list[str]:
    """Damage one file, load; a launched run finds several checkpoints damaged, a file each."""
    if trial.real:
        return _launched(written, trial)
    root = trial.directory / "checkpoints"
    link_tree(written.small / "checkpoints", root)
    victim, how = _damage_a_file(root / NEWEST, trial.chance)
    path, pieces, passed_over = load_newest(root)
    assert path.name == OLDER, f"{victim}, {how}: not found"
    assert [str(error.path) for error in passed_over] == [str(victim)], f"{victim}, {how}: {passed_over}"
    for piece in pieces:
        assert torch.equal(piece.tensor, written.state[f"{piece.kind}/{piece.name}"]), piece.name
    return f"{_kind_of(str(victim.relative_to(root / NEWEST)))}: {how}"


def _damage_a_file(checkpoint: Path, chance: Random) -> tuple[Path, str]:
    victim = chance.choice(list(_files(checkpoint)))
    return victim, damage(victim, chance)


def _launched(written: Written, trial: Trial) -> list[str]:
    """Every file named, the oldest checkpoint taken, and the next step that of a run that nobody disturbed."""
    chance, root = trial.chance, trial.directory / "checkpoints"
    layout = chance.choice(_LAYOUTS)
    expected = written.losses(layout)
    link_tree(written.large(layout) / "checkpoints", root)
    damaged = [path for path in sorted(root.glob("step_*")) if path.name != OLDER]
    assert len(damaged) == _AT_ONCE
    victims = [(checkpoint, *_damage_a_file(checkpoint, chance)) for checkpoint in damaged]
    said = finish(layout, write_run(trial.directory, *LAYOUTS[layout], *_LAUNCHED, "run.stop_at=2", **BIG))
    hits = []
    for checkpoint, victim, how in victims:
        name = str(victim.relative_to(checkpoint))
        named = rf"passed over.*{checkpoint.name}.*{re.escape(name)}"
        assert re.search(named, said), f"{checkpoint.name}, {name}, {how}: {said[-2000:]}"
        hits.append(f"launched, {layout}: {_kind_of(name)} of 80 MB")
    assert f"{OLDER}, at step 1" in said, f"{victims}: {said[-2000:]}"
    assert read_losses(trial.directory) == {2: expected[2]}, f"{victims}"
    return hits


CAMPAIGN = Campaign(
    target=10_000,
    what="a bit flipped, a file cut, a block zeroed, in any file of the newest of two checkpoints; launched: "
    f"in each of {_AT_ONCE} checkpoints, all but the oldest",
    passes="every file named before a step is taken, the older checkpoint loaded to the bit",
    prepare=Written,
    trial=trial,
    at_once=_AT_ONCE,
)
