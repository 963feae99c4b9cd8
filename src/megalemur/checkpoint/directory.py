"""The directory of a run's checkpoints: which are there, which verify, which may go. Free of torch.

Believes a `step_*` directory whose manifest verifies, and nothing else: no pointer file, never a `*.tmp-*`.
"""

import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from typing import NamedTuple

from megalemur.checkpoint.digests import FileEntry, verified_chunks
from megalemur.checkpoint.errors import DamagedCheckpoint, NoGoodCheckpoint
from megalemur.checkpoint.manifest import MANIFEST, Manifest, parse_manifest
from megalemur.config.plain_files import read_plain


class Newest(NamedTuple):
    """The newest checkpoint that verifies, and the newer ones that do not."""

    path: Path | None
    """None when the directory holds no checkpoint at all."""
    passed_over: tuple[DamagedCheckpoint, ...]


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies once it is complete."""
    return root / f"step_{step:06d}"


def checkpoint_directories(root: Path) -> list[Path]:
    """Committed checkpoints, newest first; whether they verify is another question."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := re.fullmatch(r"step_(\d{6,})", path.name))]
    return [path for _, path in sorted(found, reverse=True)]


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


def newest_checkpoint(root: Path) -> Newest:
    """The newest checkpoint under `root` whose manifest and file sizes verify; `verify_checkpoint` reads all bytes.

    Raises:
        NoGoodCheckpoint: there are checkpoints, and none verifies.
    """
    damaged = []
    for path in checkpoint_directories(root):
        try:
            open_manifest(path)
        except DamagedCheckpoint as error:
            damaged.append(error)
        else:
            return Newest(path, tuple(damaged))
    if damaged:
        raise NoGoodCheckpoint(root, damaged)
    return Newest(None, ())


def prune(root: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints that verify; returns what is gone. 0 keeps all.

    Call it on one rank, after a commit. Damaged checkpoints count for nothing and go only once `keep` good ones are
    newer. Unfinished saves (`*.tmp-*`) are left alone: another process may be writing them.
    """
    good, gone = 0, []
    for path in checkpoint_directories(root) if keep else []:
        if good >= keep:
            _remove(path)
            gone.append(path)
            continue
        try:
            open_manifest(path)
        except DamagedCheckpoint:
            continue
        good += 1
    return gone


def _remove(path: Path) -> None:
    # renamed first: a half-deleted directory must never look like a checkpoint
    doomed = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def sync_directory(path: Path) -> None:
    """Make the names inside a directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
