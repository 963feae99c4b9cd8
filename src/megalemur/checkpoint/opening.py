"""A checkpoint whose manifest and sizes verify: its small files, each compared, and the headers of its weight files.

Opened by a group, rank 0 alone reads them and hands them on: ranks that looked for themselves could see different ones.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megalemur.checkpoint.digests import entry_of
from megalemur.checkpoint.directory import open_manifest
from megalemur.checkpoint.errors import CheckpointError, DamagedCheckpoint, UnreadableCheckpoint
from megalemur.checkpoint.exchange import Attempt, Peers
from megalemur.checkpoint.manifest import MANIFEST, Manifest, dump_manifest, is_trainers, parse_manifest
from megalemur.checkpoint.tensor_header import Header, HeaderEntry, read_header
from megalemur.config.plain_files import read_plain
from megalemur.config.strict_json import canonical_json, parse_json

TENSORS = ".safetensors"
_WIDTHS = ("F32", "BF16", "F16")


@dataclass(frozen=True, eq=False)
class OpenedCheckpoint:
    """What is known of a checkpoint before a tensor is read."""

    path: Path
    manifest: Manifest
    held: dict[str, bytes] = field(default_factory=dict, repr=False)
    """Small files that were read and compared, by name."""
    _headers: dict[str, Header] = field(default_factory=dict, repr=False)

    def file(self, name: str) -> bytes:
        """A small file; its digest was compared.

        Raises:
            CheckpointError: the checkpoint has no such file.
            DamagedCheckpoint: its bytes are not those that were written.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: the manifest lists no file {name!r}")
        if name not in self.held:
            try:
                data = read_plain(self.path / name, follow_links=False)
            except OSError as error:
                raise UnreadableCheckpoint(self.path / name, f"cannot be read: {error.strerror}") from error
            if entry_of(data) != entry:
                raise DamagedCheckpoint(self.path / name, "its bytes differ from those that were written (xxh3_128)")
            self.held[name] = data
        return self.held[name]

    def weight_headers(self) -> dict[str, Header]:
        """Headers of the Hugging Face files, by name.

        Raises:
            DamagedCheckpoint: no safetensors file, or it and the manifest list other tensors.
        """
        for name in self.manifest.files:
            if name.endswith(TENSORS) and not is_trainers(name) and name not in self._headers:
                self._headers[name] = read_header(self.path / name, follow_links=False)
        shapes, seen = self.manifest.shapes, set[str]()
        for file, header in self._headers.items():
            for name, entry in header.tensors.items():
                if shapes.get(name) != entry.shape or name in seen or entry.dtype not in _WIDTHS:
                    what = f"{name!r} {entry.dtype} {list(entry.shape)}"
                    raise DamagedCheckpoint(self.path / file, f"{what} is not what the manifest lists")
                seen.add(name)
        if len(seen) != len(shapes):
            raise DamagedCheckpoint(self.path / MANIFEST, f"lists {len(shapes)} tensors, the weight files {len(seen)}")
        return dict(self._headers)


def open_checkpoint(path: Path) -> OpenedCheckpoint:
    """Open a checkpoint by this process alone; small files are read when they are asked for.

    Raises:
        DamagedCheckpoint: the manifest does not verify, or a file has another size than it says.
    """
    return OpenedCheckpoint(path, open_manifest(path))


def open_together(path: Path, peers: Peers) -> OpenedCheckpoint:
    """The same, read by rank 0 and handed to all, with every small file and every header. A collective.

    Raises:
        DamagedCheckpoint: on every rank alike; small files and headers count too.
    """
    attempt, parts = Attempt(), list[bytes]()
    if peers.rank == 0:
        with attempt.step():
            parts = _pack(open_checkpoint(path))
    peers.raise_together(attempt.error, f"opening {path}")
    lengths = peers.all_gather([len(part) for part in parts])[0]
    data, at, shared = peers.share(b"".join(parts)), 0, []
    for length in lengths:
        shared.append(data[at : at + length])
        at += length
    return _unpack(path, shared)


class SmallFiles:
    """Small files of a directory with a model. What a manifest lists is compared with it; other files may lie there."""

    def __init__(self, path: Path, opened: OpenedCheckpoint | None = None):
        self._path = path
        if opened is None and (path / MANIFEST).exists():
            opened = open_checkpoint(path)
        self._opened = opened

    def get(self, name: str) -> bytes | None:
        """The bytes of a file, or None where there is none.

        Raises:
            DamagedCheckpoint: it is not what was written, or cannot be read.
        """
        if self._opened is not None and name in self._opened.manifest.files:
            return self._opened.file(name)
        try:
            return read_plain(self._path / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnreadableCheckpoint(self._path / name, f"cannot be read: {error.strerror}") from error


def _pack(opened: OpenedCheckpoint) -> list[bytes]:
    """Manifest, table of contents, small files in the order of the table."""
    headers = {name: [header.size, header.tensors] for name, header in opened.weight_headers().items()}
    names = [name for name in opened.manifest.files if not name.endswith(TENSORS)]
    files = [opened.file(name) for name in names]
    return [dump_manifest(opened.manifest), canonical_json([names, headers]), *files]


def _unpack(path: Path, parts: list[bytes]) -> OpenedCheckpoint:
    names, headers = parse_json(parts[1])
    found = {
        file: Header(size, {name: HeaderEntry(d, tuple(shape), a, b) for name, (d, shape, a, b) in tensors.items()})
        for file, (size, tensors) in headers.items()
    }
    held = dict(zip(names, parts[2:], strict=True))
    return OpenedCheckpoint(path, parse_manifest(parts[0], path / MANIFEST), held, found)
