"""Every effect that a save has on the file system: one plain function an effect, and nothing else in this room writes.

Called as `disk.rename(...)`, so that a test can stop a save at each of them. Free of torch; errors are OSErrors.
"""

import ctypes
import errno
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MAX_PARTS = 1024
"""Buffers that Linux takes in one write (IOV_MAX)."""
_SYNC_FILE_RANGE_WRITE = 2
"""linux/fs.h: start writing dirty pages of the range, do not wait."""


def make_directory(path: Path) -> None:
    """Create one directory that must not be there."""
    os.mkdir(path)


def create(path: Path) -> int:
    """Create a file that must not be there, and open it to be written."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def write(file: int, parts: Sequence[memoryview | bytes]) -> None:
    """Append all bytes of the parts, in one call of the system where it takes them."""
    left = [part for part in parts if len(part)]
    while left:
        count = os.writev(file, left[:_MAX_PARTS])
        if not count:
            raise OSError(errno.EIO, "the file takes no more bytes")
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = memoryview(left[0])[count:]


def start_writing(file: int, start: int, size: int) -> None:
    """Let the disk begin with bytes that were written: `sync` then finds most of them there. Waits for nothing.

    Advice, not an effect: nothing is promised, and where the system does not know the call nothing happens.
    """
    call = _sync_file_range()
    if call is not None:
        call(file, start, size, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Any:
    """Linux' call of that name, which Python does not offer; None where there is none."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def sync(file: int) -> None:
    """Bring an open file's bytes to the disk."""
    os.fsync(file)


def close(file: int) -> None:
    """Close an open file."""
    os.close(file)


def sync_directory(path: Path) -> None:
    """Make the names inside a directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(old: Path, new: Path) -> None:
    """Give something another name at once; a plain file of that name is replaced, a directory with content refuses."""
    os.rename(old, new)


def unlink(path: Path) -> None:
    """Remove a file or link; one that is gone already is no error: two may clear away the same folder."""
    path.unlink(missing_ok=True)


def remove_directory(path: Path) -> None:
    """Remove an empty directory; one that is gone already is no error."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return


def make_directories(path: Path) -> None:
    """Create a directory and what is missing above it; each name is on the disk before anything is put inside."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        try:
            make_directory(directory)
        except FileExistsError:
            continue  # another run was faster
        sync_directory(directory.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory and everything in it; links are removed, never followed."""
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(Path(entry.path))
        else:
            unlink(Path(entry.path))
    remove_directory(path)
