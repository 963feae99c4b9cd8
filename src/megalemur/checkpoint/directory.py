"""The directory of a run's checkpoints: which are there and which verify. Only reads. Free of torch.

Believes a `step_*` directory whose manifest verifies, and nothing else: no pointer file, never a `*.tmp-*`.
"""

import re
import stat
from pathlib import Path
from typing import NamedTuple

from megalemur.checkpoint.digests import FileEntry, verified_chunks
from megalemur.checkpoint.errors import DamagedCheckpoint, NoGoodCheckpoint
from megalemur.checkpoint.manifest import MANIFEST, Manifest, parse_manifest
from megalemur.config.plain_files import read_plain

_COMMITTED = re.compile(r"step_(\d{6,})(\.replaced-[0-9a-f]+)?", re.ASCII)


class Newest(NamedTuple):
    """The newest checkpoint that verifies, and the newer ones that do not."""

    path: Path | None
    """None when the directory holds no checkpoint at all."""
    passed_over: tuple[DamagedCheckpoint, ...]


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies once it is complete."""
    return root / f"step_{step:06d}"


def step_of(path: Path) -> int | None:
    """The step of a committed checkpoint by its directory's name; None for anything else."""
    match = _COMMITTED.fullmatch(path.name)
    return int(match[1]) if match else None


def is_replaced(path: Path) -> bool:
    """Whether a committed checkpoint made room for a newer one of its own step."""
    return ".replaced-" in path.name


def checkpoint_directories(root: Path) -> list[Path]:
    """Committed checkpoints, newest first; whether they verify is another question.

    One that made room for another of its step comes after that one: it counts when a kill left nothing in its place.
    """
    if not root.is_dir():
        return []
    found = [(step, not is_replaced(path), path) for path in root.iterdir() if (step := step_of(path)) is not None]
    return [path for _, _, path in sorted(found, reverse=True)]


def open_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files all have the stated sizes. Reads one small file.

    Raises:
        DamagedCheckpoint: names the file and what is wrong with it.
    """
    where = path / MANIFEST
    try:
        data = read_plain(where, follow_links=False)
    except OSError as error:
        raise DamagedCheckpoint(where, f"cannot be read: {error.strerror}") from error
    manifest = parse_manifest(data, where)
    for folder in sorted({(path / name).parent for name in manifest.files} - {path}):
        if folder.is_symlink():
            raise DamagedCheckpoint(folder, "is a link")
    for name, entry in manifest.files.items():
        _check_size(path / name, entry)
    return manifest


def _check_size(path: Path, entry: FileEntry) -> None:
    try:
        found = path.lstat()
    except OSError as error:
        raise DamagedCheckpoint(path, f"cannot be read: {error.strerror}") from error
    # a link could point anywhere by the time it is read
    if not stat.S_ISREG(found.st_mode):
        raise DamagedCheckpoint(path, "is not a plain file")
    if found.st_size != entry.size:
        raise DamagedCheckpoint(path, f"has {found.st_size} bytes, the manifest says {entry.size}")


def verify_checkpoint(path: Path) -> Manifest:
    """The manifest of a checkpoint, after reading every file in full and comparing its digest.

    Raises:
        DamagedCheckpoint: names the first file that differs.
    """
    manifest = open_manifest(path)
    for name, entry in manifest.files.items():
        for _ in verified_chunks(path / name, entry):
            pass
    return manifest


def open_whole(path: Path) -> Manifest:
    """`open_manifest` of a checkpoint that a run can resume from.

    Raises:
        DamagedCheckpoint: as there, or its trainer's part was dropped.
    """
    manifest = open_manifest(path)
    if manifest.dropped:
        raise DamagedCheckpoint(
            path / MANIFEST,
            "holds weights only, its trainer's part was dropped (checkpoint.keep_weights_every): nothing to resume "
            "from; name it as checkpoint.start_from of a new run",
        )
    return manifest


def newest_checkpoint(root: Path) -> Newest:
    """The newest whole checkpoint under `root` by manifest and file sizes; `verify_checkpoint` reads all bytes.

    Raises:
        NoGoodCheckpoint: there are checkpoints, and none can be resumed from.
    """
    damaged = []
    for path in checkpoint_directories(root):
        try:
            open_whole(path)
        except DamagedCheckpoint as error:
            damaged.append(error)
        else:
            return Newest(path, tuple(damaged))
    if damaged:
        raise NoGoodCheckpoint(root, damaged)
    return Newest(None, ())
