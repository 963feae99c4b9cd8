"""Which checkpoints stay, which keep their weights only, and which go. Free of torch.

Deletes nothing before a newer checkpoint stands whose digests were read back from the disk after its commit.
"""

from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from megalemur.checkpoint import disk
from megalemur.checkpoint.directory import checkpoint_directories, is_replaced, open_manifest, step_of
from megalemur.checkpoint.draft import aside, remove
from megalemur.checkpoint.errors import DamagedCheckpoint
from megalemur.checkpoint.manifest import MANIFEST, TRAINER, Manifest, dump_manifest, without_trainer


class Rules(NamedTuple):
    """What to keep; the settings of the same names."""

    keep: int = 0
    """Newest whole checkpoints; 0 keeps all, and then the others say nothing."""
    keep_every: int = 0
    """Steps whose checkpoints stay for good; 0: none."""
    keep_weights_every: int = 0
    """Steps whose checkpoints keep their weights for good; 0: none."""


class Fate(Enum):
    """What becomes of a checkpoint."""

    STAYS = "stays"
    WEIGHTS_ONLY = "keeps its weights"
    GOES = "goes"


class Retained(NamedTuple):
    """What a pass over the directory has changed."""

    gone: list[Path]
    thinned: list[Path]


class Found(NamedTuple):
    """A committed checkpoint."""

    path: Path
    step: int
    manifest: Manifest | None
    """None: it is damaged as far as manifest and sizes tell."""

    @property
    def is_whole(self) -> bool:
        """Whether a run could resume from it, as far as manifest and sizes tell."""
        return self.manifest is not None and not self.manifest.dropped


def survey(root: Path) -> list[Found]:
    """Every committed checkpoint, newest first. Reads the manifests only."""
    return [Found(path, step_of(path) or 0, _manifest_of(path)) for path in checkpoint_directories(root)]


def _manifest_of(path: Path) -> Manifest | None:
    try:
        return open_manifest(path)
    except DamagedCheckpoint:
        return None


def fates(found: Collection[Found], rules: Rules) -> dict[Path, Fate]:
    """What the rules say about each, given newest first.

    The newest `keep` whole ones stay, and what lies between them. Damaged ones count for nothing. One that was replaced
    by another of its step goes.
    """
    decided, whole = {}, 0
    for item in found:
        if is_replaced(item.path):
            decided[item.path] = Fate.GOES
        elif not rules.keep or whole < rules.keep or _is_due(item.step, rules.keep_every):
            decided[item.path] = Fate.STAYS
        elif _is_due(item.step, rules.keep_weights_every):
            decided[item.path] = Fate.WEIGHTS_ONLY
        else:
            decided[item.path] = Fate.GOES
        whole += item.is_whole and not is_replaced(item.path)
    return decided


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def retain(root: Path, rules: Rules, *, read_back: Collection[Path]) -> Retained:
    """Delete and thin out what the rules no longer want. One process of a run calls it, after a commit.

    Safe to kill at any point and to repeat: a checkpoint is whole, or weights only, or no checkpoint.

    Args:
        root: folder of the run's checkpoints.
        rules: what to keep.
        read_back: checkpoints whose every byte was read from the disk since their commit, and compared. Only what is
            older than the newest of these that stays whole is touched; without one, nothing.
    """
    found = survey(root)
    decided = fates(found, rules)
    safe = [f for f in found if f.path in read_back and f.is_whole and decided[f.path] is Fate.STAYS]
    done = Retained([], [])
    if not safe:
        return done
    newest = safe[0]
    # the oldest first: after a kill the newer ones are still there
    for item in reversed([f for f in found if _is_older(f, newest)]):
        if decided[item.path] is Fate.GOES:
            remove(item.path)
            done.gone.append(item.path)
        elif decided[item.path] is Fate.WEIGHTS_ONLY and item.manifest is not None and _thin(item.path, item.manifest):
            done.thinned.append(item.path)
    return done


def _is_older(item: Found, than: Found) -> bool:
    return item.step < than.step or (item.step == than.step and is_replaced(item.path))


def set_aside(path: Path) -> Path:
    """Take its name from a checkpoint that turned out damaged; it is kept, as `step_N.damaged-…`, and never counted."""
    kept = aside(path, "damaged")
    disk.rename(path, kept)
    disk.sync_directory(path.parent)
    return kept


def _thin(path: Path, manifest: Manifest) -> bool:
    """Drop the trainer's part: from the manifest, at once, then from the disk. Whether there was something to do."""
    if not manifest.dropped:
        fresh = path / f"{MANIFEST}.new"
        disk.unlink(fresh)  # of an attempt that was killed
        file = disk.create(fresh)
        try:
            disk.write(file, [dump_manifest(without_trainer(manifest))])
            disk.sync(file)
        finally:
            disk.close(file)
        disk.rename(fresh, path / MANIFEST)
        disk.sync_directory(path)
    if not (path / TRAINER).exists():
        return False
    disk.remove_tree(path / TRAINER)
    return True


def describe(retained: Retained) -> Iterator[str]:
    """Lines for the log."""
    words: Mapping[str, list[Path]] = {"deleted": retained.gone, "kept the weights only of": retained.thinned}
    for word, paths in words.items():
        if paths:
            yield f"{word} {', '.join(path.name for path in paths)}"
