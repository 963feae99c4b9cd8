"""What a power cut leaves of a save: its effects on the disk, recorded once, then replayed up to any of them.

Names are durable behind `sync_directory` of their folder, bytes behind `sync` of their file. Of what was not synced, a
crash keeps any beginning of a folder's changes, in their order, and any of a file's bytes, none, some, or zeros.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megalemur.checkpoint import disk


class Effect(NamedTuple):
    """One call of checkpoint/disk.py that came to its end."""

    name: str
    target: Any
    """Path, or the file's descriptor."""
    detail: Any = None
    """Descriptor, new name, or bytes."""


@dataclass
class File:
    """Bytes in memory, and those that are on the disk for sure."""

    data: bytes = b""
    durable: bytes = b""

    def after_a_crash(self, chance: random.Random) -> bytes:
        """What may be found."""
        kept = chance.randrange(len(self.data) + 1)
        zeros = self.data[:kept] + bytes(len(self.data) - kept)
        return self.data if self.data == self.durable else chance.choice([self.durable, self.data[:kept], zeros])


@dataclass
class Folder:
    """Names in memory, those that are on the disk for sure, and the changes between the two, in their order."""

    names: dict[str, "Folder | File"] = field(default_factory=dict)
    durable: dict[str, "Folder | File"] = field(default_factory=dict)
    pending: list[tuple[str, "Folder | File | None"]] = field(default_factory=list)

    def change(self, *changes: tuple[str, "Folder | File | None"]) -> None:
        """Set or remove names at once."""
        for name, node in changes:
            _set(self.names, name, node)
        self.pending.append(changes)  # type: ignore[arg-type]

    def sync(self) -> None:
        """Everything is durable."""
        self.durable, self.pending = dict(self.names), []

    def write_to(self, path: Path, chance: random.Random) -> None:
        """What a crash leaves."""
        path.mkdir(exist_ok=True)
        found = dict(self.durable)
        for changes in self.pending[: chance.randrange(len(self.pending) + 1)]:
            for name, node in changes:
                _set(found, name, node)  # type: ignore[arg-type]
        for name, node in found.items():
            if isinstance(node, File):
                (path / name).write_bytes(node.after_a_crash(chance))
            else:
                node.write_to(path / name, chance)


def _set(names: dict[str, Any], name: str, node: Any) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def read_tree(path: Path) -> Folder:
    """A folder that has been on the disk for long."""
    folder = Folder()
    for entry in path.iterdir():
        data = None if entry.is_dir() else entry.read_bytes()
        folder.names[entry.name] = read_tree(entry) if data is None else File(data, data)
    folder.sync()
    return folder


@contextmanager
def recorded() -> Iterator[list[Effect]]:
    """Keep every effect of a block on the disk, in order. One thread at a time may have effects."""
    effects: list[Effect] = []
    originals = {name: getattr(disk, name) for name in _DETAILS}

    def recording(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(target: Any, *rest: Any) -> Any:
            detail = b"".join(map(bytes, rest[0])) if name == "write" else rest[0] if rest else None
            result = original(target, *rest)
            effects.append(Effect(name, target, result if name == "create" else detail))
            return result

        return run

    for name, original in originals.items():
        setattr(disk, name, recording(name, original))
    try:
        yield effects
    finally:
        for name, original in originals.items():
            setattr(disk, name, original)


_DETAILS = (
    "make_directory",
    "create",
    "write",
    "sync",
    "close",
    "sync_directory",
    "rename",
    "unlink",
    "remove_directory",
)


def replay(before: Folder, root: Path, effects: list[Effect]) -> None:
    """Apply effects below `root` to what was there before."""
    files: dict[int, File] = {}
    for name, target, detail in effects:
        if name in ("make_directory", "create"):
            node = Folder() if name == "make_directory" else File()
            _parent(before, root, target).change((target.name, node))
            if isinstance(node, File):
                files[detail] = node
        elif name == "write":
            files[target].data += detail
        elif name == "sync":
            files[target].durable = files[target].data
        elif name == "sync_directory":
            _at(before, root, target).sync()
        elif name == "rename":
            parent = _parent(before, root, target)
            parent.change((target.name, None), (detail.name, parent.names[target.name]))
        elif name in ("unlink", "remove_directory"):
            _parent(before, root, target).change((target.name, None))


def _at(before: Folder, root: Path, path: Path) -> Folder:
    node: Any = before
    for part in path.relative_to(root).parts:
        node = node.names[part]
    return node


def _parent(before: Folder, root: Path, path: Path) -> Folder:
    return _at(before, root, path.parent)
