"""A destination in the making: a folder beside it, a journal of what is done, and the rename that makes it whole.

The folder is called `NAME.converting`; nothing takes it for a checkpoint. A conversion that was killed is gone on with
from its journal.
"""

import fcntl
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from checkpoints_tools.errors import ConversionError
from checkpoints_tools.layout import Frame, Layout, Stretch
from megalemur.checkpoint import disk
from megalemur.checkpoint.digests import FileEntry
from megalemur.config.strict_json import canonical_json

_JOURNAL, _LOCK, _TREE = "journal.jsonl", "lock", "tree"
_SPARE_BYTES = 256 << 20
"""Kept free on the disk besides what the destination takes: small files, the journal, the file system's own."""


class Done(BaseModel):
    """A line of the journal: a unit whose bytes are on the disk."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    unit: int
    digests: dict[str, dict[str, str]]
    """Kind to tensor to xxh3_128 of its rows."""
    entries: dict[str, tuple[int, list[str]]]
    """File to size and digests of chunks, where the layout asked for them."""
    stretches: dict[str, list[tuple[int, int, int]]]

    def file_entries(self) -> dict[str, FileEntry]:
        """As files are described elsewhere."""
        return {file: FileEntry(size, tuple(chunks)) for file, (size, chunks) in self.entries.items()}

    def file_stretches(self) -> dict[str, list[Stretch]]:
        """As files are described elsewhere."""
        return {file: [Stretch(*stretch) for stretch in found] for file, found in self.stretches.items()}


@dataclass
class Draft:
    """The folder of one conversion, locked by the process that fills it."""

    destination: Path
    plan: str
    """Digest of everything that decides what is written."""
    done: dict[int, Done] = field(default_factory=dict)
    _lock: int = -1
    _journal: int = -1

    @property
    def folder(self) -> Path:
        """Beside the destination."""
        return self.destination.with_name(f"{self.destination.name}.converting")

    @property
    def tree(self) -> Path:
        """What becomes the destination."""
        return self.folder / _TREE

    def open(self, *, resume: bool) -> None:
        """Create the folder, or go on in it.

        Raises:
            ConversionError: the destination is there, the folder belongs to something else, or is in use.
        """
        if self.destination.exists() or self.destination.is_symlink():
            raise ConversionError(f"{self.destination} is there already; name another destination, or remove it first")
        if self.folder.exists() and not resume:
            raise ConversionError(
                f"{self.folder} was left by a conversion that did not end; add --resume to go on with it, or remove it"
            )
        disk.make_directories(self.tree)
        self._take_lock()
        self._read_journal()

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(f"{self.folder}: another process is filling it; wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks; the journal still tells what is done

    def _read_journal(self) -> None:
        path = self.folder / _JOURNAL
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        whole = b"".join(line + b"\n" for line in lines[:-1])  # a crash may have torn the last one
        if lines[:-1]:
            if lines[0].decode("ascii", "replace") != self.plan:
                raise ConversionError(
                    f"{self.folder} belongs to a conversion of another source or with other options (or the source has "
                    "changed since); remove it, or give the options of then"
                )
            for line in lines[1:-1]:
                try:
                    done = Done.model_validate_json(line)
                except ValidationError as error:
                    raise ConversionError(
                        f"{path} is damaged: {error.errors()[0]['msg']}; remove {self.folder}"
                    ) from None
                self.done[done.unit] = done
        self._journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        os.ftruncate(self._journal, len(whole))
        os.lseek(self._journal, 0, os.SEEK_END)
        if not whole:
            disk.write(self._journal, [self.plan.encode() + b"\n"])
            disk.sync(self._journal)

    def note(self, done: Done) -> None:
        """A unit's bytes are on the disk."""
        disk.write(self._journal, [canonical_json(done.model_dump(mode="json")) + b"\n"])
        disk.sync(self._journal)
        self.done[done.unit] = done

    def commit(self) -> None:
        """Everything is on the disk: one rename."""
        for folder in sorted({path.parent for path in self.tree.rglob("*")} | {self.tree}, reverse=True):
            disk.sync_directory(folder)
        disk.rename(self.tree, self.destination)
        disk.sync_directory(self.destination.parent)
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let go of the folder; what is in it stays."""
        for handle in (self._lock, self._journal):
            if handle >= 0:
                os.close(handle)
        self._lock = self._journal = -1


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file and bring it to the disk, whatever an earlier attempt left there."""
    disk.make_directories(path.parent)
    path.unlink(missing_ok=True)
    handle = disk.create(path)
    try:
        disk.write(handle, [data])
        disk.sync(handle)
    finally:
        disk.close(handle)


def write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes at their place in an open file."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


def write_frames(path: Path, frames: Sequence[Frame]) -> None:
    """Write what is no tensor's into a file whose tensors are there."""
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for frame in frames:
            write_at(handle, frame.data, frame.offset)
    finally:
        os.close(handle)


def plan_digest(layout: Layout, source: Mapping[str, object]) -> str:
    """Digest of what will be written, and of what it is made from."""
    frames: dict[str, Sequence[Frame]] = dict(layout.frames)
    said = {
        "format": layout.format,
        "source": source,
        "sizes": layout.sizes,
        "units": [[list(key) for key in unit] for unit in layout.units],
        "regions": [
            [*key, [[*r.box.start, *r.box.stop, r.file, r.offset, str(r.dtype)] for r in regions]]
            for key, regions in sorted(layout.regions.items())
        ],
        "frames": {n: [[f.offset, xxhash.xxh3_128_hexdigest(f.data)] for f in found] for n, found in frames.items()},
        "small": {name: xxhash.xxh3_128_hexdigest(data) for name, data in layout.small_files.items()},
    }
    return xxhash.xxh3_128_hexdigest(canonical_json(said))


def refuse_full_disk(layout: Layout, draft: Draft) -> None:
    """Compare what is still to be written with what the disk has.

    Raises:
        ConversionError: names the sizes.
    """
    wanted = sum(layout.sizes.values()) + sum(map(len, layout.small_files.values())) + _SPARE_BYTES
    there = sum(path.stat().st_blocks * 512 for path in draft.tree.rglob("*") if path.is_file())
    free = shutil.disk_usage(draft.tree).free
    if wanted - there > free:
        raise ConversionError(
            f"{draft.destination.parent} has {free / 1e9:.1f} GB free, and the conversion takes {wanted / 1e9:.1f} GB"
            + (f", of which {there / 1e9:.1f} GB are written" if there else "")
            + "; make room, or name a destination on another disk"
        )
