"""What torch.save writes: a tree of plain values, and tensors as places in the file. No tensor is read."""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints_tools.foreign.pickles import (
    PlannedStorage,
    PlannedView,
    Storage,
    StorageType,
    read_pickle,
    write_pickle,
)
from checkpoints_tools.foreign.values import Namespace, PickleError, Stub, are_counts, refuse_unfolding
from checkpoints_tools.foreign.zips import Plan, PlannedRecord, Record, Window, read_records
from checkpoints_tools.layout import Frame

_PICKLE, _STORAGES, _ORDER = "data.pkl", "data/", "byteorder"
_NAME = "archive"
_MAX_PICKLE_BYTES = 2 << 20
"""A tensor takes 170 bytes of it, settings some 100,000: room for all weights and moments of a Llama of 405 billion."""


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Elements."""
    offset: int
    """First byte of element 0 in the file."""
    bytes: int
    """From there to the end of the tensor's storage."""

    @property
    def is_contiguous(self) -> bool:
        """Whether its rows lie one behind the other."""
        step = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != step:
                return False
            step *= extent
        return True


class Archive(NamedTuple):
    """What an archive says."""

    tree: Any
    """dict, list, tuple, text, numbers, None, Namespace, Stub and StoredTensor."""
    stubs: tuple[str, ...] = ()
    """Classes that were not called and that no checkpoint needs."""


@dataclass(frozen=True, eq=False)
class _Storage(Storage):
    """Bytes that tensors are views of."""

    offset: int
    """First byte in the file."""
    size: int
    dtype: torch.dtype | None

    def tensor(
        self, dtype: torch.dtype | None, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> StoredTensor:
        """A view, which must lie inside."""
        dtype = dtype or self.dtype
        if dtype is None:
            raise PickleError("a tensor has no dtype")
        last = sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        needed, first = 0 if 0 in shape else (last + 1) * dtype.itemsize, offset * dtype.itemsize
        if first + needed > self.size:
            raise PickleError(f"a tensor of {needed} bytes lies at byte {first} of a storage of {self.size}")
        return StoredTensor(dtype, shape, strides, self.offset + first, self.size - first)


def read_archive(path: Path, first: int = 0, size: int | None = None) -> Archive:
    """The archive in bytes [first, first + size) of a file; to its end where no size is given.

    Raises:
        DamagedCheckpoint: it cannot be read, or is not what torch.save writes.
    """
    with Window(path, first, size) as window:
        records = read_records(window)
        prefixes = [name.removesuffix(_PICKLE) for name in records if name.endswith(f"/{_PICKLE}")]
        if len(prefixes) != 1:
            raise window.damaged(f"it has {len(prefixes)} records of the name {_PICKLE}")
        (prefix,) = prefixes
        order = records.get(prefix + _ORDER)
        if order is not None and window.read(order.offset - first, min(order.size, 16)).strip() != b"little":
            raise window.damaged("its numbers are not little-endian")
        where = records[prefix + _PICKLE]
        if where.size > _MAX_PICKLE_BYTES:
            raise window.damaged(f"{_PICKLE} has {where.size} bytes, and no checkpoint more than {_MAX_PICKLE_BYTES}")
        data = window.read(where.offset - first, where.size)
        if where.crc not in (0, zlib.crc32(data)):  # 0: torch was told not to compute them
            raise window.damaged(f"the bytes of {prefix}{_PICKLE} are not those that were written (CRC-32)")
        storages = {name.removeprefix(prefix + _STORAGES): record for name, record in records.items()}
        try:
            tree, stubs = read_pickle(data, lambda pid: _storage(pid, storages))
            refuse_unfolding(tree)
            return Archive(tree, stubs)
        except PickleError as error:
            raise window.damaged(str(error)) from None


def _storage(pid: Any, records: Mapping[str, Record]) -> _Storage | Stub:
    """What a persistent id stands for: ("storage", class, key, device, elements)."""
    if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
        raise PickleError("it refers to what is no storage")
    _, kind, key, _, elements = pid
    if not isinstance(key, str) or not re.fullmatch("[0-9]{1,18}", key) or not are_counts([elements]):
        raise PickleError("a storage's key or size is no number")
    if key not in records:
        raise PickleError(f"storage {key} is not in the archive")
    if not isinstance(kind, StorageType):
        return Stub("a storage of an unknown class")
    record, width = records[key], kind.dtype.itemsize if kind.dtype is not None else 1
    if elements * width > record.size:
        raise PickleError(f"storage {key} claims {elements * width} bytes and has {record.size}")
    return _Storage(record.offset, elements * width, kind.dtype)


class PlannedTensor(NamedTuple):
    """A contiguous tensor that will be written into an archive."""

    name: str
    """Unique in the archive."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Framed:
    """An archive before its tensors are written."""

    size: int
    """Bytes."""
    offsets: Mapping[str, int]
    """Tensor to its first byte in the file."""
    _plan: Plan
    _records: Mapping[str, str]

    def frames(self, crcs: Mapping[str, int]) -> list[Frame]:
        """Everything but the tensors.

        Args:
            crcs: tensor to CRC-32 of its bytes.
        """
        known = {record: crcs[name] for name, record in self._records.items()}
        return self._plan.frames({**known, **self._small})

    @property
    def _small(self) -> dict[str, int]:
        return {record.name: zlib.crc32(record.data) for record in self._plan.records if record.data is not None}


def frame_archive(tree: Any, at: int = 0) -> Framed:
    """The archive that torch.save would write of a tree of plain values, Namespace and PlannedTensor.

    Args:
        tree: the values.
        at: first byte of the archive in its file.
    """
    tensors: dict[str, PlannedTensor] = {}
    storages: dict[str, str] = {}

    def planned(value: Any) -> Any:
        if isinstance(value, PlannedTensor):
            assert value.name not in tensors, f"{value.name} is in the archive twice"
            tensors[value.name] = value
            key = storages[value.name] = str(len(storages))
            return PlannedView(PlannedStorage(key, value.dtype, torch.Size(value.shape).numel()), tuple(value.shape))
        if isinstance(value, Namespace):
            return Namespace(planned(value.values))
        if isinstance(value, dict):
            return type(value)((key, planned(inner)) for key, inner in value.items())
        return type(value)(map(planned, value)) if type(value) in (list, tuple) else value

    data = write_pickle(planned(tree))
    records = [_record(_PICKLE, data), _record(_ORDER, b"little")]
    records += [
        PlannedRecord(f"{_NAME}/{_STORAGES}{storages[name]}", tensor.bytes, None) for name, tensor in tensors.items()
    ]
    plan = Plan([*records, _record("version", b"3\n")], at)
    names = {name: f"{_NAME}/{_STORAGES}{key}" for name, key in storages.items()}
    return Framed(plan.size, {name: plan.offsets[record] for name, record in names.items()}, plan, names)


def _record(name: str, data: bytes) -> PlannedRecord:
    return PlannedRecord(f"{_NAME}/{name}", len(data), data)


def dump_archive(tree: Any) -> bytes:
    """An archive without tensors."""
    framed = frame_archive(tree)
    if framed.offsets:
        raise ValueError(f"{next(iter(framed.offsets))} is a tensor; frame_archive places it")
    data = bytearray(framed.size)
    for frame in framed.frames({}):
        data[frame.offset : frame.offset + len(frame.data)] = frame.data
    return bytes(data)
