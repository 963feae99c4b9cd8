"""What a directory offers to load, and where its bytes lie: our checkpoints and Hugging Face directories.

Trusts no file name, no shape and no dtype that a file states. Of a checkpoint of ours no byte is used uncompared.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import xxhash

from megalemur.checkpoint.errors import CheckpointError, DamagedCheckpoint, UnreadableCheckpoint
from megalemur.checkpoint.exchange import Attempt, Peers
from megalemur.checkpoint.hf_files import INDEX, SINGLE
from megalemur.checkpoint.manifest import MANIFEST, STATE, Manifest, dump_manifest, is_plain_path
from megalemur.checkpoint.opening import TENSORS, OpenedCheckpoint, open_checkpoint
from megalemur.checkpoint.portions import Extent, StoredFile
from megalemur.checkpoint.scatter import Scatter
from megalemur.checkpoint.tensor_file import DTYPES
from megalemur.checkpoint.tensor_header import Header, read_header
from megalemur.config.plain_files import read_plain
from megalemur.config.strict_json import canonical_json, parse_json
from megalemur.parallel.boxes import whole
from megalemur.parallel.state import MASTER, Box, Piece


class Listed(NamedTuple):
    """A tensor that a directory offers."""

    shape: tuple[int, ...]
    dtype: str
    """safetensors' word: F32, BF16, F16, or one that no weight may have."""
    file: Path
    """Where it is listed, for messages."""


class TensorReader(Protocol):
    """What `load_pieces` reads from."""

    @property
    def path(self) -> Path:
        """The directory."""

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of state on offer."""

    @property
    def tensors(self) -> Mapping[str, Listed]:
        """Every tensor on offer, known before anything is read."""

    @property
    def fingerprint(self) -> str:
        """Equal on two ranks only if both see the same tensors at the same places."""

    def stored_files(self) -> list[StoredFile]:
        """Every file that a load reads."""


class CheckpointReader:
    """The fp32 state in one of our checkpoints, whatever layout wrote it; its weights, where the state was dropped.

    Args:
        path: the checkpoint.
        opened: what is known of it already.

    Raises:
        DamagedCheckpoint: the manifest does not verify or a file has another size than it says.
    """

    def __init__(self, path: Path, *, opened: OpenedCheckpoint | None = None):
        self.path = path
        self.opened = opened or open_checkpoint(path)
        self.kinds = frozenset(self.manifest.state) or frozenset({MASTER})
        if self.manifest.state:
            self.tensors = {name: Listed(shape, "F32", path / MANIFEST) for name, shape in self.shapes.items()}
        else:
            self.tensors = _listing(path, self.opened.weight_headers())

    @property
    def manifest(self) -> Manifest:
        """What the checkpoint consists of."""
        return self.opened.manifest

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model that was saved."""
        return dict(self.manifest.shapes)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Width of every tensor in the Hugging Face files."""
        return accepted_dtypes(_listing(self.path, self.opened.weight_headers()))

    @property
    def fingerprint(self) -> str:
        """Of the manifest."""
        return xxhash.xxh3_128_hexdigest(dump_manifest(self.manifest))

    @cached_property
    def state(self) -> dict[str, Any]:
        """trainer/state.json."""
        try:
            return parse_json(self.file(STATE))
        except ValueError as error:
            raise DamagedCheckpoint(self.path / STATE, str(error)) from error

    def file(self, name: str) -> bytes:
        """A small file by its path in the checkpoint; its digest is compared."""
        return self.opened.file(name)

    def stored_files(self) -> list[StoredFile]:
        """Every file but the small ones that were compared when the checkpoint was opened."""
        extents: dict[str, list[Extent]] = {}
        for kind, tensors in self.manifest.state.items():
            for name, found in tensors.items():
                for stored in found:
                    extent = Extent(name, kind, stored.box, torch.float32, stored.offset)
                    extents.setdefault(stored.file, []).append(extent)
        if not self.manifest.state:
            extents = {file: _extents(header, self.tensors) for file, header in self.opened.weight_headers().items()}
        return [
            StoredFile(self.path / name, entry.size, entry, _in_order(extents.get(name, [])))
            for name, entry in sorted(self.manifest.files.items())
            if name not in self.opened.held
        ]

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        """The box as fp32; every chunk that it touches is compared.

        Raises:
            DamagedCheckpoint: a chunk is not what was written.
        """
        return read_box(self, name, kind, box)


class HuggingFaceReader:
    """The weights in a Hugging Face directory: one or many safetensors files. Values are cast to fp32 as they are.

    Of a checkpoint of ours, the files are compared with its manifest. Elsewhere links are followed: the hub's cache is
    made of them.

    Args:
        path: the directory.
        derived: pattern of tensor names that some files carry and no model loads, such as rotary frequencies.

    Raises:
        CheckpointError: no safetensors weights, or an ambiguous choice of them.
        DamagedCheckpoint: a broken or missing shard, an index that does not fit the files or leaves the directory.
    """

    kinds = frozenset({MASTER})

    def __init__(self, path: Path, *, derived: str | None = None):
        self.path = path
        self.manifest = open_checkpoint(path).manifest if (path / MANIFEST).exists() else None
        self._headers = self._single() if self._is_single() else self._sharded()
        self.tensors = {
            name: listed
            for name, listed in _listing(path, self._headers).items()
            if derived is None or not re.fullmatch(derived, name)
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: listed.shape for name, listed in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Width of every tensor of an accepted dtype."""
        return accepted_dtypes(self.tensors)

    @property
    def fingerprint(self) -> str:
        """Of all headers."""
        headers = {name: [header.size, header.tensors] for name, header in self._headers.items()}
        return xxhash.xxh3_128_hexdigest(canonical_json(headers))

    def stored_files(self) -> list[StoredFile]:
        """The weight files."""
        return [
            StoredFile(self.path / name, header.size, self._entry(name), _in_order(_extents(header, self.tensors)))
            for name, header in sorted(self._headers.items())
        ]

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        """The box of a weight as fp32; `kind` is master."""
        return read_box(self, name, kind, box)

    def _entry(self, name: str) -> Any:
        return None if self.manifest is None else self.manifest.files.get(name)

    def _is_single(self) -> bool:
        single, index = (self.path / SINGLE).exists(), (self.path / INDEX).exists()
        if single and index:
            raise CheckpointError(f"{self.path} holds {SINGLE} and {INDEX}; remove the one that is not meant")
        if single or index:
            return single
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a directory")
        if (self.path / "pytorch_model.bin").exists() or (self.path / "pytorch_model.bin.index.json").exists():
            raise CheckpointError(
                f"{self.path} holds pytorch_model.bin, a pickle that can run code; convert it to safetensors first "
                "(transformers: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…))"
            )
        raise CheckpointError(f"{self.path} holds neither {SINGLE} nor {INDEX}")

    def _header(self, file: str) -> Header:
        if self.manifest is not None and file not in self.manifest.files:
            raise DamagedCheckpoint(self.path / file, "is a weight file that the manifest does not list")
        return read_header(self.path / file, follow_links=self.manifest is None)

    def _single(self) -> dict[str, Header]:
        return {SINGLE: self._header(SINGLE)}

    def _sharded(self) -> dict[str, Header]:
        where = self.path / INDEX
        weight_map = self._weight_map(where)
        missing = sorted(file for file in set(weight_map.values()) if not (self.path / file).exists())
        if missing:
            raise DamagedCheckpoint(where, f"names files that are not there: {', '.join(missing)}")
        named: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            named.setdefault(file, set()).add(name)
        found = {}
        for file in sorted(named):
            found[file] = self._header(file)
            if found[file].tensors.keys() != named[file]:
                odd = ", ".join(sorted(found[file].tensors.keys() ^ named[file])[:5])
                raise DamagedCheckpoint(
                    self.path / file, f"holds other tensors than {INDEX} says; first of them: {odd}"
                )
        return found

    def _weight_map(self, where: Path) -> dict[str, str]:
        try:
            weight_map = parse_json(read_plain(where))["weight_map"]
            for name, file in weight_map.items():
                if not (isinstance(file, str) and is_plain_path(file) and "/" not in file and len(file) < 200):
                    raise ValueError(
                        f"{name} lies in {str(file)[:200]!r}, which is no plain file name of this directory"
                    )
                if not file.endswith(TENSORS):
                    raise ValueError(f"{name} lies in {file!r}, which is no safetensors file")
        except OSError as error:
            raise UnreadableCheckpoint(where, f"cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(where, f"is no usable index: {error}") from error
        return weight_map


def accepted_dtypes(tensors: Mapping[str, Listed]) -> dict[str, torch.dtype]:
    """Width of every tensor of an accepted dtype."""
    return {name: DTYPES[listed.dtype] for name, listed in tensors.items() if listed.dtype in DTYPES}


def read_box(reader: TensorReader, name: str, kind: str, box: Box) -> torch.Tensor:
    """One box as an fp32 CPU tensor, read by this process alone: for looking at a checkpoint, not for loading it.

    Raises:
        CheckpointError: there is no such box, or its bytes cannot be had.
    """
    listed = reader.tensors.get(name)
    if listed is None or kind not in reader.kinds or whole(listed.shape).intersect(box) != box:
        raise CheckpointError(f"{reader.path} holds no {kind} of {name} at {box}")
    piece = Piece(name, kind, listed.shape, box, torch.empty(box.shape))
    attempt, wanted = Attempt(), {(kind, name): [(0, box)]}
    Scatter(reader.stored_files(), Peers(None), [wanted], everything=False).run([piece], attempt)
    if attempt.error is not None:
        raise attempt.error
    return piece.tensor


def _listing(path: Path, headers: Mapping[str, Header]) -> dict[str, Listed]:
    return {
        name: Listed(entry.shape, entry.dtype, path / file)
        for file, header in headers.items()
        for name, entry in header.tensors.items()
    }


def _extents(header: Header, wanted: Mapping[str, Listed]) -> list[Extent]:
    """The weights in a file that can be loaded."""
    return [
        Extent(name, MASTER, whole(entry.shape), DTYPES[entry.dtype], entry.start)
        for name, entry in header.tensors.items()
        if name in wanted and entry.dtype in DTYPES
    ]


def _in_order(extents: list[Extent]) -> tuple[Extent, ...]:
    return tuple(sorted((extent for extent in extents if extent.box.size), key=lambda extent: extent.offset))
