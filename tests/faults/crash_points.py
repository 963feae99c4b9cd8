"""Every effect that a save has on the disk as the last one: kills, and power cuts that lose what was not synced.

A power cut is replayed from a record: bytes are durable behind `sync` of their file, names behind `sync_directory` of
their folder, and nothing else is.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from megalemur.checkpoint import disk
from megalemur.checkpoint.contents import Contents
from megalemur.checkpoint.directory import verify_checkpoint
from megalemur.checkpoint.draft import open_draft
from megalemur.checkpoint.saver import Saver
from megalemur.cli import exit_codes
from megalemur.config.checkpoint import CheckpointConfig
from tests.faults.campaign import Campaign, Trial
from tests.faults.damage import load_newest
from tests.faults.kills import EVERY, LENGTH, Reference, judge_directory, judge_end, phase
from tests.faults.runs import BIG, LAYOUTS, finish, write_run
from tests.support.injections import environment
from tests.unit.checkpoint.small import EFFECTS
from tests.unit.checkpoint.synthetic import contents, whole_pieces


class Scene(NamedTuple):
    """A directory of checkpoints, and the save that is interrupted."""

    before: tuple[int, ...]
    """Steps saved before, in this order."""
    leftover: bool
    """A killed save has left its folder."""
    step: int
    """The save."""
    settings: dict[str, Any]
    points: int
    """Effects on the disk, counted in a dry run."""


SCENES = {
    "the second save": Scene((1,), False, 2, {}, 30),
    "a save behind a killed one": Scene((1,), True, 2, {}, 36),
    "a step saved again": Scene((1, 2), False, 2, {}, 41),
    "a save with retention": Scene((1, 2, 3), False, 4, {"keep": 1, "keep_weights_every": 2}, 60),
}
NAMES = ("undone", "kept", "some")
"""What becomes of names that were not synced: none, all, or the first few in a folder are on the disk."""
DATA = ("dropped", "cut", "zeroed")
"""What becomes of bytes that were not synced."""
VARIANTS = (("killed before", ""), ("killed behind", ""), *product(NAMES, DATA))
CASES = [
    (name, point, variant)
    for name, scene in SCENES.items()
    for point in range(1, scene.points + 1)
    for variant in VARIANTS
]


class Crash(BaseException):
    """No handler of the program sees it; a dead process handles nothing."""


@dataclass
class File:
    """Bytes as the page cache has them, and how many are on the disk."""

    data: bytearray
    durable: int


@dataclass
class Folder:
    """What it has held since it was last synced: first what is on the disk, last what the page cache says."""

    states: list[dict[str, "File | Folder"]] = field(default_factory=lambda: [{}])

    def change(self, **names: "File | Folder | None") -> None:
        """Set and remove names at once."""
        fresh = {**self.states[-1], **names}
        self.states.append({name: what for name, what in fresh.items() if what is not None})


def _read(path: Path) -> "File | Folder":
    if path.is_dir():
        return Folder([{entry.name: _read(entry) for entry in path.iterdir()}])
    data = path.read_bytes()
    return File(bytearray(data), len(data))


class Disk:
    """Stands between the program and the disk: does what it is told, records it, and ends everything at one point."""

    def __init__(self, root: Path, last: int, *, behind: bool):
        self.root, self.last, self.behind = root, last, behind
        self.tree = _read(root)
        self.done, self.dead = 0, False
        self.files: dict[int, File] = {}
        self.durable_commit = False
        """Whether the folder of the checkpoints was synced behind the rename that commits."""
        self._renamed = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap every effect; in the end close what a dead process would not hold, its locks above all."""
        originals = {name: getattr(disk, name) for name in EFFECTS}
        for name, effect in originals.items():
            setattr(disk, name, partial(self._run, name, effect))
        try:
            yield
        finally:
            for name, effect in originals.items():
                setattr(disk, name, effect)
            for file in self.files:
                os.close(file)

    def _run(self, name: str, effect: Callable[..., Any], *arguments: Any) -> Any:
        if self.dead:  # handlers on the way out; the dead have none
            raise Crash
        self.done += 1
        if self.done == self.last and not self.behind:
            self._die()
        found = None if name in ("sync", "sync_directory") else effect(*arguments)
        getattr(self, f"_{name}")(found, *arguments)
        if self.done == self.last:
            self._die()
        return found

    def _die(self) -> None:
        self.dead = True
        raise Crash

    def _folder(self, path: Path) -> Folder:
        found = self.tree
        for part in path.relative_to(self.root).parts:
            assert isinstance(found, Folder)
            found = found.states[-1][part]
        assert isinstance(found, Folder)
        return found

    def _make_directory(self, _: None, path: Path) -> None:
        self._folder(path.parent).change(**{path.name: Folder()})

    def _create(self, file: int, path: Path) -> None:
        self.files[file] = File(bytearray(), 0)
        self._folder(path.parent).change(**{path.name: self.files[file]})

    def _write(self, _: None, file: int, parts: Any) -> None:
        for part in parts:
            self.files[file].data += part

    def _sync(self, _: None, file: int) -> None:
        self.files[file].durable = len(self.files[file].data)

    def _close(self, _: None, file: int) -> None:
        del self.files[file]

    def _sync_directory(self, _: None, path: Path) -> None:
        folder = self._folder(path)
        del folder.states[:-1]
        self.durable_commit |= self._renamed

    def _rename(self, _: None, old: Path, new: Path) -> None:
        assert old.parent == new.parent
        folder = self._folder(old.parent)
        folder.change(**{new.name: folder.states[-1][old.name], old.name: None})
        self._renamed |= ".tmp-" in old.name and "." not in new.name

    def _unlink(self, _: None, path: Path) -> None:
        self._folder(path.parent).change(**{path.name: None})

    _remove_directory = _unlink

    def write_survivors(self, to: Path, names: str, data: str, chance: Random) -> None:
        """What is found after the power has come back."""
        self._survive(self.tree, to, names, data, chance)

    def _survive(self, what: "File | Folder", to: Path, names: str, data: str, chance: Random) -> None:
        if isinstance(what, Folder):
            to.mkdir()
            chosen = {"undone": what.states[0], "kept": what.states[-1], "some": chance.choice(what.states)}[names]
            for name, entry in chosen.items():
                self._survive(entry, to / name, names, data, chance)
            return
        rest = len(what.data) - what.durable
        if data == "zeroed":
            to.write_bytes(bytes(what.data[: what.durable]) + bytes(rest))
        else:
            to.write_bytes(what.data[: what.durable + (chance.randint(0, rest) if data == "cut" else 0)])


def contents_of(step: int, again: bool = False) -> Contents:
    """A state that no other save has."""
    pieces = whole_pieces()
    for piece in pieces:
        piece.tensor.add_(step + 0.5 * again)
    return contents(pieces, step)


def save(root: Path, step: int, settings: dict[str, Any], *, again: bool = False) -> None:
    """As a run does, with its read-back and retention."""
    saver = Saver(CheckpointConfig(directory=root, asynchronous=False, **settings), None)
    saver.save(contents_of(step, again))
    saver.raise_last()


class Shared(NamedTuple):
    """What trials go by."""

    scenes: Path
    reference: Reference
    """Losses of launched runs."""


def prepare(directory: Path) -> Shared:
    """The scenes, and that their effects are as many as stated."""
    for name, scene in SCENES.items():
        root = directory / name
        for step in scene.before:
            save(root, step, {})
        if scene.leftover:
            draft = open_draft(root, scene.step)
            (draft.path / "config.json").write_bytes(b"half")
            draft.close()
        shutil.copytree(root, directory / "dry")
        dry = Disk(directory / "dry", 0, behind=False)
        with dry.installed():
            save(directory / "dry", scene.step, scene.settings, again=True)
        shutil.rmtree(directory / "dry")
        assert dry.done == scene.points, f"{name}: {dry.done} effects, SCENES says {scene.points}"
    (directory / "launched").mkdir()
    return Shared(directory, Reference(directory / "launched"))


def check(root: Path, scene: Scene, must_be_new: bool) -> str:
    """The old checkpoint or the new one loads, to the bit, and the next save works; says which one."""
    path, pieces, passed_over = load_newest(root)
    step = verify_checkpoint(path).step
    old, new = max(scene.before), scene.step
    wanted = [contents_of(new, again=True)] + ([] if must_be_new else [contents_of(old)])
    loaded = {(piece.name, piece.kind): piece.tensor for piece in pieces}
    fitting = [
        what.step
        for what in wanted
        if what.step == step and all(torch.equal(loaded[piece.name, piece.kind], piece.tensor) for piece in what.pieces)
    ]
    assert fitting, f"{path.name} is neither old nor new" + (", although the save was done" if must_be_new else "")
    assert not passed_over, passed_over
    is_new = torch.equal(loaded[wanted[0].pieces[0].name, wanted[0].pieces[0].kind], wanted[0].pieces[0].tensor)
    save(root, new + 1, scene.settings)
    assert load_newest(root)[0].name == f"step_{new + 1:06d}"
    return "the new one" if is_new else "the old one"


def trial(shared: Shared, trial: Trial) -> str:
    """One point, one way to go on from there."""
    return _launched(shared.reference, trial) if trial.real else _replayed(shared.scenes, trial)


def _launched(reference: Reference, trial: Trial) -> str:
    """A rank of the launcher ends itself at one of its effects on the disk."""
    chance, layout = trial.chance, trial.chance.choice(["dp2", "tp2", "pp2"])
    rank, behind = chance.randrange(2), chance.random() < 0.5
    point = chance.randint(1, (60, 15)[rank])  # rank 1 makes and renames no folders: four saves have fewer for it
    background = chance.choice(["true", "false"])
    settings = (*LENGTH, f"checkpoint.save_every={EVERY}", f"checkpoint.asynchronous={background}")
    run_file = write_run(trial.directory, *LAYOUTS[layout], *settings, **BIG)
    finish(layout, run_file, exit_codes.RANK_DIED, **environment("die", rank=rank, effect=point, behind=behind))
    hit = phase(trial.directory / "checkpoints")
    _, step = judge_directory(trial.directory)
    said = finish(layout, run_file)
    judge_end(trial.directory, said, step, reference.losses(layout, True), exact=True)
    return f"launched: {'a background' if background == 'true' else 'a plain'} save, {hit}"


def _replayed(scenes: Path, trial: Trial) -> str:
    # every tenth trial is none of them
    name, point, (first, second) = CASES[(trial.number - trial.number // 10 - 1) % len(CASES)]
    scene, root = SCENES[name], trial.directory / "checkpoints"
    shutil.copytree(scenes / name, root)
    recorded = Disk(root, point, behind=first != "killed before")
    crashed = False
    with recorded.installed():
        try:
            save(root, scene.step, scene.settings, again=True)
        except Crash:
            crashed = True
    assert crashed, f"{name}: point {point} was not reached"
    if second:
        root = trial.directory / "survivors"
        recorded.write_survivors(root, first, second, trial.chance)
    found = check(root, scene, recorded.durable_commit)
    return f"{name}, {'power cut' if second else 'kill'}: {found}"


CAMPAIGN = Campaign(
    target=-(-len(CASES) * 10 // 9),
    what=f"each of the {len(CASES) // len(VARIANTS)} effects on the disk of a save, in {len(SCENES)} scenes, as the "
    "last one: kill before and behind it; power cut with unsynced names undone, kept or in part, unsynced bytes "
    "dropped, cut or zeroed",
    passes="the checkpoint before or the new one verifies and loads to the bit, the new one for sure once the save is "
    "done, and the next save works; real trials: one of two ranks dies at a random effect, losses go on to the bit",
    prepare=prepare,
    trial=trial,
)
