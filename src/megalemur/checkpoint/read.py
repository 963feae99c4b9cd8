"""Reads boxes of tensors, as fp32, out of our checkpoints and out of Hugging Face directories.

Trusts no file name, no shape and no dtype that a file states.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megalemur.checkpoint.digests import entry_of
from megalemur.checkpoint.directory import open_manifest
from megalemur.checkpoint.errors import CheckpointError, DamagedCheckpoint
from megalemur.checkpoint.hf_files import INDEX, SINGLE
from megalemur.checkpoint.manifest import MANIFEST, STATE, Stored, is_plain_path, tensor_key
from megalemur.checkpoint.tensor_file import DTYPES
from megalemur.config.strict_json import parse_json
from megalemur.parallel.boxes import Box
from megalemur.parallel.state import MASTER


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

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        """The box as an fp32 CPU tensor of the box's shape."""


class _TensorFiles:
    """Open safetensors files; each is opened once and stays mapped."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def listing(self, path: Path) -> dict[str, Listed]:
        """Every tensor of a file; reads the header only."""
        file = self._file(path)
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return {name: Listed(tuple(s.get_shape()), s.get_dtype(), path) for name, s in slices.items()}

    def read(self, path: Path, key: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        """Part of a tensor that must have this shape."""
        try:
            part = self._file(path).get_slice(key)
            if tuple(part.get_shape()) != shape:
                raise DamagedCheckpoint(path, f"{key} has shape {part.get_shape()}, not {list(shape)}")
            if part.get_dtype() not in DTYPES:
                raise DamagedCheckpoint(path, f"{key} is {part.get_dtype()}; use one of {', '.join(DTYPES)}")
            return part[box.slices]
        except SafetensorError as error:
            raise DamagedCheckpoint(path, f"{key}: {error}") from error

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise DamagedCheckpoint(path, f"is no complete safetensors file: {error}") from error
        return self._open[path]


class CheckpointReader:
    """The fp32 state in one of our checkpoints, whatever layout wrote it.

    Raises:
        DamagedCheckpoint: the manifest does not verify or a file has another size than it says.
    """

    def __init__(self, path: Path):
        self.path = path
        self.manifest = open_manifest(path)
        self.kinds = frozenset(self.manifest.state)
        self.tensors = {name: Listed(shape, "F32", path / MANIFEST) for name, shape in self.manifest.shapes.items()}
        self._files = _TensorFiles()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model that was saved."""
        return dict(self.manifest.shapes)

    @cached_property
    def state(self) -> dict[str, Any]:
        """trainer/state.json."""
        try:
            return parse_json(self.file(STATE))
        except ValueError as error:
            raise DamagedCheckpoint(self.path / STATE, str(error)) from error

    def file(self, name: str) -> bytes:
        """A small file by its path in the checkpoint; its digest is compared."""
        if name not in self.manifest.files:
            raise CheckpointError(f"{self.path}: the manifest lists no file {name!r}")
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise DamagedCheckpoint(self.path / name, f"cannot be read: {error.strerror}") from error
        if entry_of(data) != self.manifest.files[name]:
            raise DamagedCheckpoint(self.path / name, "its bytes differ from those that were written (xxh3_128)")
        return data

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        """The box as fp32, put together from the stored boxes that it meets.

        Raises:
            DamagedCheckpoint: a rank file does not hold what the manifest says.
        """
        result = torch.empty(box.shape)
        filled = 0
        for stored in self.manifest.state[kind][name]:
            shared = box.intersect(stored.box)
            if shared is not None:
                result[shared.relative_to(box).slices] = self._read_part(name, kind, stored, shared)
                filled += shared.size
        # stored boxes are disjoint (the manifest was checked), so equal counts mean full coverage
        if filled != box.size:
            raise CheckpointError(f"{self.path}: {tensor_key(name, kind, box)} holds {filled} of {box.size} elements")
        return result

    def _read_part(self, name: str, kind: str, stored: Stored, wanted: Box) -> torch.Tensor:
        key = tensor_key(name, kind, stored.box)
        return self._files.read(self.path / stored.file, key, stored.box.shape, wanted.relative_to(stored.box))


class HuggingFaceReader:
    """The weights in a Hugging Face directory: one or many safetensors files. Values are cast to fp32 as they are.

    Links are followed: the hub's cache is made of them.

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
        self._files = _TensorFiles()
        found = self._single() if self._is_single() else self._sharded()
        self.tensors = {
            name: listed for name, listed in found.items() if derived is None or not re.fullmatch(derived, name)
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: listed.shape for name, listed in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Width of every tensor of an accepted dtype."""
        return {name: DTYPES[listed.dtype] for name, listed in self.tensors.items() if listed.dtype in DTYPES}

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        """The box of a weight as fp32; `kind` is master."""
        if kind != MASTER:
            raise CheckpointError(f"{self.path}: a Hugging Face directory holds weights and no {kind}")
        listed = self.tensors[name]
        return self._files.read(listed.file, name, listed.shape, box).to(torch.float32)

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

    def _single(self) -> dict[str, Listed]:
        return self._files.listing(self.path / SINGLE)

    def _sharded(self) -> dict[str, Listed]:
        where = self.path / INDEX
        weight_map = self._weight_map(where)
        missing = sorted(file for file in set(weight_map.values()) if not (self.path / file).exists())
        if missing:
            raise DamagedCheckpoint(where, f"names files that are not there: {', '.join(missing)}")
        found = {}
        for file in sorted(set(weight_map.values())):
            listing = self._files.listing(self.path / file)
            named = {name for name, other in weight_map.items() if other == file}
            if listing.keys() != named:
                odd = ", ".join(sorted(listing.keys() ^ named)[:5])
                raise DamagedCheckpoint(
                    self.path / file, f"holds other tensors than {INDEX} says; first of them: {odd}"
                )
            found.update(listing)
        return found

    def _weight_map(self, where: Path) -> dict[str, str]:
        try:
            weight_map = parse_json(where.read_bytes())["weight_map"]
            for name, file in weight_map.items():
                if not (isinstance(file, str) and is_plain_path(file) and "/" not in file):
                    raise ValueError(f"{name} lies in {file!r}, which is no plain file name of this directory")
                if not file.endswith(".safetensors"):
                    raise ValueError(f"{name} lies in {file!r}, which is no safetensors file")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(where, f"is no usable index: {error}") from error
        return weight_map
