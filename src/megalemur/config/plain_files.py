"""Opens files that somebody else may have made. Refuses what is no plain file: opening a pipe waits for ever, and a
device has no end."""

import errno
import os
import stat
from pathlib import Path

MAX_SMALL_BYTES = 256 << 20
"""Largest file that is read as a whole: more than any tokenizer, index or manifest, less than a host's memory."""


def open_plain(path: Path, *, follow_links: bool = True) -> int:
    """A descriptor for reading, which the caller closes.

    Args:
        path: the file.
        follow_links: whether the last name of the path may be a link, as in the hub's cache.

    Raises:
        OSError: it cannot be opened, or is no plain file.
    """
    # looked at before it is opened: opening alone does things to some devices
    _refuse_special(path.stat() if follow_links else path.lstat(), path)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW))
    try:
        _refuse_special(os.fstat(handle), path)
    except OSError:
        os.close(handle)
        raise
    return handle


def read_plain(path: Path, limit: int = MAX_SMALL_BYTES, *, follow_links: bool = True) -> bytes:
    """A small file as a whole.

    Raises:
        OSError: as `open_plain`, or it has more than `limit` bytes.
    """
    with os.fdopen(open_plain(path, follow_links=follow_links), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"has {size} bytes, more than the {limit} that such a file may have", str(path))
        return file.read(limit + 1)[:limit]


def _refuse_special(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is not a plain file", str(path))
