"""`.metadata` of torch's distributed checkpoints: which chunks a tensor was cut into, and where each archive lies."""

import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints_tools.foreign.pickles import read_pickle, write_pickle
from checkpoints_tools.foreign.values import PickleError, Stub, are_counts
from megalemur.checkpoint.errors import DamagedCheckpoint, UnreadableCheckpoint
from megalemur.checkpoint.manifest import is_plain_path
from megalemur.config.plain_files import read_plain

_MODULE = "torch.distributed.checkpoint.metadata."
_MAX_BYTES = 256 << 20
"""154 to 220 bytes a chunk: room for a million, where 70 billion parameters and their moments on 4096 ranks make a
quarter of that."""
_MAX_DIMENSIONS = 9
"""A tensor's eight, and the axis of flat shards."""


class DcpChunk(NamedTuple):
    """A box of a tensor, and the bytes of the archive that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    first: int
    length: int


class DcpTensor(NamedTuple):
    """A tensor as a whole."""

    size: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[DcpChunk, ...]


class DcpMetadata(NamedTuple):
    """What lies in a checkpoint."""

    tensors: Mapping[str, DcpTensor]
    objects: Mapping[str, tuple[str, int, int]] = {}
    """Everything that is no tensor: file, first byte, length."""
    notes: tuple[str, ...] = ()
    """Classes that were not called."""


def read_dcp_metadata(path: Path) -> DcpMetadata:
    """The file.

    Raises:
        DamagedCheckpoint: it is not what torch writes.
    """
    try:
        tree, stubs = read_pickle(read_plain(path, _MAX_BYTES))
        places = _places(_field(tree, "storage_data"))
        tensors, objects = {}, {}
        for name, entry in _field(tree, "state_dict_metadata").items():
            if isinstance(entry, Stub) and entry.name == f"{_MODULE}TensorStorageMetadata":
                tensors[_text(name)] = _tensor(name, entry, places)
            elif _key(_text(name), None) in places:
                objects[_text(name)] = places[_key(name, None)]
            else:
                raise PickleError(f"nothing says where {_text(name)} lies")
        return DcpMetadata(tensors, objects, stubs)
    except OSError as error:
        raise UnreadableCheckpoint(path, f"cannot be read: {error.strerror}") from error
    except (PickleError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise DamagedCheckpoint(path, f"is no metadata of a distributed checkpoint: {error}") from None


_Key = tuple[str, bytes | None]
_Places = dict[_Key, tuple[str, int, int]]


def _key(name: str, offsets: tuple[int, ...] | None) -> _Key:
    """Offsets as bytes: many tuples of numbers can be made to have one hash, and a dict of them takes for ever."""
    return name, None if offsets is None else struct.pack(f"<{len(offsets)}Q", *offsets)


def _field(value: Any, name: str) -> dict[Any, Any]:
    found = value.get(name) if isinstance(value, Stub) else None
    if not isinstance(found, dict):
        raise PickleError(f"it has no {name}")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PickleError("a tensor has no name")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMENSIONS or not are_counts(value):
        raise PickleError(f"a shape or offset is no list of at most {_MAX_DIMENSIONS} numbers from 0 up")
    return tuple(value)


def _places(storage: Mapping[Any, Any]) -> _Places:
    """(tensor, offsets of the chunk) to file, first byte and length."""
    found: _Places = {}
    for index, info in storage.items():
        if not isinstance(index, Stub) or not isinstance(info, Stub):
            raise PickleError("a place in storage_data is none")
        offset = index.get("offset")
        file, first, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if not isinstance(file, str) or not is_plain_path(file) or "/" in file:
            shown = repr(file[:200]) if isinstance(file, str) else f"a {type(file).__name__}"
            raise PickleError(f"{shown} is no file of this directory")
        if not are_counts([first, length]):
            raise PickleError(f"{file}: its offset and length are no range of bytes")
        if info.get("transform_descriptors"):
            raise PickleError(f"{file}: what it holds is compressed or changed in another way")
        name = _text(index.get("fqn"))
        key = _key(name, None if offset is None else _numbers(offset))
        if key in found:
            raise PickleError(f"{name} at {offset} lies in two places")
        found[key] = (file, first, length)
    _refuse_overlaps(found)
    return found


def _refuse_overlaps(places: _Places) -> None:
    """Each archive is opened: many with a part in common would take longer than the files are long."""
    tensors = sorted({place for (_, offsets), place in places.items() if offsets is not None})
    for (file, first, length), (other, second, _) in pairwise(tensors):
        if file == other and first + length > second:
            raise PickleError(f"{file}: two archives have bytes from {second} on in common")


def _tensor(name: str, entry: Stub, places: _Places) -> DcpTensor:
    dtype = _dtype(entry.get("properties"))
    if dtype is None:
        raise PickleError(f"{name} has no dtype")
    chunks, size, seen = [], _numbers(entry.get("size")), set[_Key]()
    for chunk in entry.get("chunks") or ():
        if not isinstance(chunk, Stub):
            raise PickleError(f"{name}: a chunk is none")
        offsets, sizes = _numbers(chunk.get("offsets")), _numbers(chunk.get("sizes"))
        if not len(offsets) == len(sizes) == len(size) or any(map(_leaves, offsets, sizes, size)):
            raise PickleError(f"{name}: its chunk at {offsets} lies outside its shape {size}")
        key = _key(name, offsets)
        if key not in places or key in seen:
            said = "it has two chunks" if key in seen else "nothing says where its chunk lies that is"
            raise PickleError(f"{name}: {said} at {offsets}")
        seen.add(key)
        chunks.append(DcpChunk(offsets, sizes, *places[key]))
    return DcpTensor(size, dtype, tuple(chunks))


def _leaves(offset: int, extent: int, size: int) -> bool:
    return offset + extent > size


def _dtype(properties: Any) -> torch.dtype | None:
    """TensorProperties pickles as a tuple (its __getstate__) or, in other versions, as a dict."""
    state = properties.state if isinstance(properties, Stub) else None
    found = state[0] if isinstance(state, tuple) and state else properties.get("dtype") if state is not None else None
    return found if isinstance(found, torch.dtype) else None


def dump_dcp_metadata(metadata: DcpMetadata) -> bytes:
    """As torch writes it, so that its reader and megatron-core's take it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    state: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for name, tensor in metadata.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in tensor.chunks]
        state[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(tensor.size), chunks)
        for number, chunk in enumerate(tensor.chunks):
            index = MetadataIndex(name, torch.Size(chunk.offsets), number)
            storage[index] = _StorageInfo(chunk.file, chunk.first, chunk.length)
    for name, place in metadata.objects.items():
        state[name] = BytesStorageMetadata()
        storage[MetadataIndex(name)] = _StorageInfo(*place)
    return write_pickle(Metadata(state, None, storage, StorageMeta()))
