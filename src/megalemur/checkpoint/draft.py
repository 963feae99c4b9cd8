"""A checkpoint in the making: its folder, the lock that tells a live writer from a dead one, the rename that commits.

The folder is called `step_N.tmp-<mark><nonce>` until then and nothing believes it. Its manifest.json is created first,
empty, and locked (flock) by the process that will fill it: the kernel gives the lock back when that process dies. Free
of torch.
"""

import errno
import fcntl
import functools
import logging
import os
import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megalemur.checkpoint import disk
from megalemur.checkpoint.directory import open_manifest, step_directory
from megalemur.checkpoint.errors import DamagedCheckpoint
from megalemur.checkpoint.manifest import MANIFEST, TRAINER

ABANDONED_SECONDS = 3600.0
"""Idle time after which a folder that no lock can vouch for is taken for dead. A live save writes, or fails, sooner."""

_DRAFT = re.compile(r"step_\d{6,}\.tmp-([0-9a-f]{8})[0-9a-f]{8}", re.ASCII)
_GONE = re.compile(r"step_\d{6,}\.gone-[0-9a-f]+", re.ASCII)

_log = logging.getLogger(__name__)


@dataclass
class Draft:
    """The folder that a save fills, as the process that commits it sees it."""

    path: Path
    final: Path
    lock: int
    """Descriptor of the empty manifest, locked; -1 once it is closed."""

    def commit(self, manifest: bytes) -> Path:
        """The manifest, everything to the disk, then the one rename that makes it a checkpoint.

        Every other file of the folder must be on the disk. A checkpoint of this step that is there already is moved
        aside first: `.replaced-` when it is good (a kill between the two renames leaves that one to resume from), else
        `.damaged-`.
        """
        disk.write(self.lock, [manifest])
        disk.sync(self.lock)
        disk.sync_directory(self.path / TRAINER)
        disk.sync_directory(self.path)
        if self.final.exists():
            disk.rename(self.final, aside(self.final, "replaced" if _is_good(self.final) else "damaged"))
        disk.rename(self.path, self.final)
        disk.sync_directory(self.final.parent)
        self.close()
        return self.final

    def discard(self) -> None:
        """Remove what was written; what cannot be removed now goes with the next `sweep`."""
        for away in (functools.partial(remove, self.path), self.close):
            try:
                away()
            except OSError as error:
                _log.warning("%s: cannot be removed: %s", self.path, error.strerror)

    def close(self) -> None:
        """Give the lock back."""
        lock, self.lock = self.lock, -1  # what cannot be closed is closed all the same: never twice
        if lock >= 0:
            disk.close(lock)


def open_draft(root: Path, step: int) -> Draft:
    """Create the folder for a step's checkpoint under `root`, with the lock and an empty trainer/."""
    disk.make_directories(root)
    final = step_directory(root, step)
    path = final.with_name(f"{final.name}.tmp-{_mark()}{secrets.token_hex(4)}")
    disk.make_directory(path)
    draft = Draft(path, final, -1)
    try:
        draft.lock = disk.create(path / MANIFEST)
        _try_lock(draft.lock)
        disk.make_directory(path / TRAINER)
    except OSError:
        draft.discard()
        raise
    return draft


def sweep(root: Path) -> list[Path]:
    """Remove what killed saves and deletions left under `root`; returns what is gone. One process of a run calls it.

    A folder whose writer lives is never touched. Where the lock says nothing (no flock on this file system, or the
    writer ran on another machine and locks may not cross), the folder goes once nothing in it has changed for
    ABANDONED_SECONDS. What cannot be removed is logged.
    """
    gone = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            if _GONE.fullmatch(path.name):
                disk.remove_tree(path)
            elif _DRAFT.fullmatch(path.name) and _is_abandoned(path):
                remove(path)
            else:
                continue
            gone.append(path)
        except OSError as error:
            _log.warning("%s: cannot be removed: %s", path, error.strerror)
    return gone


def aside(path: Path, why: str) -> Path:
    """A free name beside a checkpoint that is to make room: `replaced`, `damaged` or `gone`."""
    step = path.name.split(".")[0]
    return path.with_name(f"{step}.{why}-{secrets.token_hex(4)}")


def remove(path: Path) -> None:
    """Remove a checkpoint or draft. It loses its name first: half deleted, it must look like neither of them."""
    doomed = aside(path, "gone")
    disk.rename(path, doomed)
    disk.sync_directory(path.parent)
    disk.remove_tree(doomed)


def _is_good(path: Path) -> bool:
    try:
        open_manifest(path)
    except DamagedCheckpoint:
        return False
    return True


def _is_abandoned(path: Path) -> bool:
    locked = _is_locked(path / MANIFEST)
    if locked:
        return False
    match = _DRAFT.fullmatch(path.name)
    assert match is not None
    if locked is False and match[1] == _mark():
        return True
    return time.time() - _last_change(path) > ABANDONED_SECONDS


def _is_locked(manifest: Path) -> bool | None:
    """Whether a process holds the lock; None where that cannot be told."""
    try:
        # NFS locks for writing only what is open for writing
        file = os.open(manifest, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None  # killed before it was created, or removed in part
    try:
        return {True: False, False: True, None: None}[_try_lock(file)]
    finally:
        os.close(file)


def _try_lock(file: int) -> bool | None:
    """Lock an open file: whether that worked; None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _last_change(path: Path) -> float:
    """Newest modification of a folder or anything in it, in seconds since the epoch."""
    times = [path.stat().st_mtime]
    times += [entry.lstat().st_mtime for entry in path.rglob("*")]
    return max(times)


@functools.cache
def _mark() -> str:
    """Eight hexadecimal digits for this machine since its boot: inside it, locks can be trusted."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        text = socket.gethostname()
    return xxhash.xxh3_64_hexdigest(text.encode())[:8]
