"""Every effect of a save on the disk as a crash point: what was not synced is lost, torn or zeroed, and it resumes."""

import copy
import shutil
from pathlib import Path
from typing import NamedTuple

from megalemur.checkpoint.directory import newest_checkpoint, step_of, verify_checkpoint
from megalemur.checkpoint.load import load_pieces
from megalemur.checkpoint.read import CheckpointReader
from megalemur.checkpoint.retention import Rules, retain
from megalemur.checkpoint.save import save_checkpoint
from tests.faults.campaign import Campaign, Trial
from tests.support.crashed_disk import Effect, Folder, read_tree, recorded, replay
from tests.unit.checkpoint.synthetic import SHAPES, assert_loaded, contents, whole_pieces

_TRIES = 20  # ways to lose what was not synced, a point


class Recording(NamedTuple):
    """A folder of checkpoints, and what was done to it."""

    title: str
    before: Folder
    root: Path
    effects: list[Effect]
    committed: int
    """Effects after which the new checkpoint must be there, whatever is lost."""


def save(root: Path, step: int) -> Path:
    """A checkpoint of the synthetic state."""
    return save_checkpoint(root, contents(whole_pieces(), step), group=None, max_file_bytes=600)


def prepare(directory: Path) -> list[Recording]:
    """A new step; a step that is there already; a new step and what retention then clears away."""
    return [
        _record(directory / "new", "a new step", (4,), lambda root: save(root, 5)),
        _record(directory / "again", "a step that is there", (4, 5), lambda root: save(root, 5)),
        _record(directory / "retained", "with retention", (1, 2, 3, 4), _save_and_retain),
    ]


def _save_and_retain(root: Path) -> None:
    path = save(root, 5)
    retain(root, Rules(keep=1, keep_weights_every=2), read_back={path})


def _record(root: Path, title: str, there: tuple[int, ...], work) -> Recording:
    root.mkdir()
    for step in there:
        save(root, step)
    before = read_tree(root)
    with recorded() as effects:
        work(root)
    renamed = next(k for k, effect in enumerate(effects) if effect.name == "rename" and effect.detail.name == _FIVE)
    synced = next(k for k in range(renamed, len(effects)) if effects[k][:2] == ("sync_directory", root))
    return Recording(title, before, root, effects, synced + 1)


_FIVE = "step_000005"


def trial(recordings: list[Recording], trial: Trial) -> str:
    """Crash behind one effect, several ways; whatever is found is whole, is loaded, and can be saved behind."""
    points = [(recording, k) for recording in recordings for k in range(len(recording.effects) + 1)]
    recording, point = points[trial.number % len(points)]
    for number in range(_TRIES):
        found = trial.directory / f"{number}"
        tree = copy.deepcopy(recording.before)
        replay(tree, recording.root, recording.effects[:point])
        tree.write_to(found, trial.chance)
        newest = newest_checkpoint(found).path
        assert newest is not None, f"{recording.title}, effect {point}: nothing is left"
        step = step_of(newest)
        assert step == 5 if point >= recording.committed or "there" in recording.title else step in (4, 5)
        verify_checkpoint(newest)
        pieces = whole_pieces(filled=False)
        load_pieces(CheckpointReader(newest), pieces, shapes=SHAPES)
        assert_loaded(pieces)
        save(found, 6)
        assert step_of(newest_checkpoint(found).path) == 6
        shutil.rmtree(found)
    done = recording.effects[point - 1].name if point else "nothing"
    return f"{recording.title}, behind {done}"


CAMPAIGN = Campaign(
    target=162,
    what=f"a power cut behind every effect of a save on the disk, in turn, {_TRIES} ways to lose or tear what was not "
    "synced; a new step, one that is there already, and with retention",
    passes="a whole checkpoint is found, the new one once its rename was synced; it loads to the bit, and the next "
    "save succeeds",
    prepare=prepare,
    trial=trial,
    has_real=False,
)
