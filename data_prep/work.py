"""PREFIX.work: what is to be built, what is done, and the shards in which it lies. Survives a kill at any moment.

A unit counts as done when its line stands in the journal, whole, and its bytes in the shard have the digest that the
line gives: so nothing has to be synced on the way, and whatever a crash tore is done again. Refuses another input or
other settings than those with which it began.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import xxhash

from data_prep.encode import Extent, extent_from_json
from data_prep.errors import ChangedError, WorkError
from megalemur.data.manifest import sync, write_atomically

_PLAN, _JOURNAL, _LOCK = "plan.json", "journal.jsonl", "lock"


class Work:
    """The work directory of one output."""

    def __init__(self, prefix: Path, itemsize: int):
        """Take the directory for this process alone.

        Args:
            prefix: of the output.
            itemsize: bytes a token.

        Raises:
            WorkError: another process has it, or nobody can lock there.
        """
        self.path = Path(f"{prefix}.work")
        self._itemsize = itemsize
        # a lock on a file that its holder removed meanwhile, having ended, is worth nothing: once more
        while (lock := self._try_lock()) is None:
            pass
        self._lock = lock
        self.extents: dict[tuple[int, int], Extent] = {}
        self._journal: Any = None

    def _try_lock(self) -> IO[str] | None:
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / _LOCK
        try:
            lock = path.open("w")
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except BlockingIOError:
            lock.close()
            raise WorkError(f"{self.path}: another process builds this data set; wait for it, or stop it") from None
        except FileNotFoundError:
            pass
        except OSError as error:
            lock.close()
            raise WorkError(
                f"{path}: cannot be locked ({error.strerror}), so two builds could write over each other; give an "
                "--output on a file system with locks (Lustre: mounted with -o flock)"
            ) from None
        lock.close()
        return None

    def plan(self) -> dict[str, Any] | None:
        """What was begun here; None: nothing, or a plan that a power cut tore, with which nothing can go on."""
        try:
            return orjson.loads((self.path / _PLAN).read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):
            return None

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Start with an empty directory."""
        self.clear()
        sync(self.path)  # else a power cut may leave the journal of before beside the plan of now
        write_atomically(self.path / _PLAN, [orjson.dumps(plan)])
        self._open_journal()

    def resume(self) -> None:
        """Read the journal; lines that a crash tore, and units whose bytes are not there, are done again."""
        path = self.path / _JOURNAL
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                extent = extent_from_json(orjson.loads(line))
            except (orjson.JSONDecodeError, KeyError, TypeError):
                break
            if self.intact(extent):
                self.extents[extent.unit, extent.chunk] = extent
        write_atomically(path, map(_line, self.extents.values()))
        self._open_journal()

    def _open_journal(self) -> None:
        self._journal = (self.path / _JOURNAL).open("ab", buffering=0)

    def add(self, extent: Extent) -> None:
        """A unit is done."""
        self._journal.write(_line(extent))
        self.extents[extent.unit, extent.chunk] = extent

    def new_shard(self, worker: int) -> Path:
        """Where a worker is to write: never a file to which a process of before may still write."""
        session = len(list(self.path.glob("shard-*-0.bin")))
        while (path := self.path / f"shard-{session}-{worker}.bin").exists():
            session += 1
        return path

    def read(self, extent: Extent) -> tuple[np.ndarray, np.ndarray]:
        """(bytes of the tokens, lengths, int32) of a unit, mapped.

        Raises:
            WorkError: they are not all there.
        """
        start, lengths_at = extent.start, extent.lengths_start(self._itemsize)
        try:
            raw = np.memmap(self.path / extent.shard, np.uint8, "r") if extent.tokens else np.empty(0, np.uint8)
        except (OSError, ValueError) as error:
            raise WorkError(f"{self.path / extent.shard}: {error}") from None
        if len(raw) < (lengths_at + 4 * extent.documents if extent.tokens else 0):
            raise WorkError(f"{self.path / extent.shard}: shorter than what was written to it")
        tokens = raw[start : start + extent.tokens * self._itemsize]
        return tokens, raw[lengths_at : lengths_at + 4 * extent.documents].view("<i4")

    def intact(self, extent: Extent) -> bool:
        """Whether a unit's bytes are those that were written."""
        try:
            tokens, lengths = self.read(extent)
        except WorkError:
            return False
        digest = xxhash.xxh3_128(tokens.data)
        digest.update(lengths.data)
        return digest.hexdigest() == extent.digest

    def clear(self) -> None:
        """Throw away whatever was done."""
        self.extents = {}
        for path in self._files():
            path.unlink() if path.is_file() else shutil.rmtree(path)

    def _files(self) -> Iterator[Path]:
        return (path for path in list(self.path.iterdir()) if path.name != _LOCK)

    def remove(self) -> None:
        """The data set is complete: nothing of this is needed any more."""
        # the plan last: whoever comes after a kill sees by it what was built here
        for path in sorted(self._files(), key=lambda path: path.name == _PLAN):
            path.unlink() if path.is_file() else shutil.rmtree(path)
        shutil.rmtree(self.path)
        self.close()

    def close(self) -> None:
        """Give the directory back."""
        if self._journal is not None:
            self._journal.close()
        self._lock.close()


def _line(extent: Extent) -> bytes:
    return orjson.dumps(asdict(extent), option=orjson.OPT_NON_STR_KEYS) + b"\n"


def refuse_other_plan(begun: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Compare what was begun with what is asked now.

    Raises:
        ChangedError: names the files and settings that differ.
    """
    said = []
    old, new = ({source["name"]: source for source in plan["sources"]} for plan in (begun, now))
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in new:
            said.append(f"{name} is no longer among the input")
        elif name not in old:
            said.append(f"{name} is new among the input")
        elif old[name] != new[name]:
            parts = [
                f"{key} {old[name][key]} then, {new[name][key]} now"
                for key in old[name]
                if old[name][key] != new[name][key]
            ]
            said.append(f"{name}: {', '.join(parts)}")
    if not said and [*old] != [*new]:
        said.append("the files come in another order")
    if not said and begun["units"] != now["units"]:
        said.append("the files are cut otherwise, as by another version of megalemur")
    said += [
        f"{key} was {begun['settings'][key]} and is {now['settings'][key]}"
        for key in now["settings"]
        if begun["settings"].get(key) != now["settings"][key]
    ]
    if said:
        listing = "".join(f"\n  - {one}" for one in said[:20])
        raise ChangedError(
            f"{path} holds the begun build of another input or with other settings:{listing}\n"
            "put the input back as it was, or throw the begun build away with --restart"
        )
