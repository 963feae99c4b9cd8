"""What torch.save writes: a tree of plain values, and tensors as places in the file. No tensor is read."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints_tools.foreign.pickles import (
    MAX_BYTES,
    Namespace,
    PickleError,
    PlannedStorage,
    PlannedView,
    StorageType,
    View,
    read_pickle,
    write_pickle,
)
from checkpoints_tools.foreign.zips import Plan, PlannedRecord, Record, Window, read_records
from checkpoints_tools.layout import Frame

_PICKLE, _STORAGES, _ORDER = "data.pkl", "data/", "byteorder"
_NAME = "archive"
_MAX_DEPTH = 100


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


class _Storage(NamedTuple):
    record: Record
    dtype: torch.dtype | None


def read_archive(path: Path, first: int = 0, size: int | None = None) -> Archive:
    """The archive in bytes [first, first + size) of a file; to its end where no size is given.

    Raises:
        DamagedCheckpoint: it cannot be read, or is not what torch.save writes.
    """
    with Window(path, first, size) as window:
        records = read_records(window)
        prefix = next((name.removesuffix(_PICKLE) for name in records if name.endswith(f"/{_PICKLE}")), None)
        if prefix is None:
            raise window.damaged(f"it has no {_PICKLE}")
        order = records.get(prefix + _ORDER)
        if order is not None and order.size < 16 and window.read(order.offset - first, order.size).strip() != b"little":
            raise window.damaged("its numbers are big-endian")
        where = records[prefix + _PICKLE]
        if where.size > MAX_BYTES:
            raise window.damaged(f"{_PICKLE} has {where.size} bytes, and no checkpoint more than {MAX_BYTES}")

        def load(pid: Any) -> _Storage:
            if not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage" or not isinstance(pid[1], StorageType):
                raise PickleError("a tensor's storage is nothing that torch.save writes")
            record = records.get(f"{prefix}{_STORAGES}{pid[2]}") if isinstance(pid[2], str) else None
            if record is None:
                raise PickleError(f"storage {pid[2]!r:.80} is not in the archive")
            return _Storage(record, pid[1].dtype)

        try:
            tree, stubs = read_pickle(window.read(where.offset - first, where.size), load)
            return Archive(_placed(tree, 0), stubs)
        except PickleError as error:
            raise window.damaged(str(error)) from None


def _placed(value: Any, depth: int) -> Any:
    """The tree with every view as a place in the file."""
    if depth > _MAX_DEPTH:
        raise PickleError("it is nested too deeply")
    if isinstance(value, View):
        return _tensor(value)
    if isinstance(value, dict):
        return {key: _placed(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, Namespace):
        return Namespace(_placed(value.values, depth + 1))
    if type(value) in (list, tuple):
        return type(value)(_placed(inner, depth + 1) for inner in value)
    return value


def _tensor(view: View) -> StoredTensor:
    if not isinstance(view.storage, _Storage):
        raise PickleError("a tensor has no storage")
    dtype = view.dtype or view.storage.dtype
    if dtype is None:
        raise PickleError("a tensor has no dtype")
    record, first = view.storage.record, view.offset * dtype.itemsize
    last = sum((extent - 1) * stride for extent, stride in zip(view.shape, view.strides, strict=True))
    needed = 0 if 0 in view.shape else (last + 1) * dtype.itemsize
    if first + needed > record.size:
        raise PickleError(f"a tensor of {needed} bytes lies at byte {first} of a storage of {record.size}")
    return StoredTensor(dtype, view.shape, view.strides, record.offset + first, record.size - first)


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
