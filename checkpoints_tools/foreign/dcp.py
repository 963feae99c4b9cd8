"""`.metadata` of torch's distributed checkpoints: which chunks a tensor was cut into, and where each archive lies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints_tools.foreign.machine import PickleError, Stub, are_counts
from checkpoints_tools.foreign.pickles import MAX_BYTES, read_pickle, write_pickle
from megalemur.checkpoint.errors import DamagedCheckpoint, UnreadableCheckpoint
from megalemur.checkpoint.manifest import is_plain_path
from megalemur.config.plain_files import read_plain

_MODULE = "torch.distributed.checkpoint.metadata."


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
        tree, stubs = read_pickle(read_plain(path, MAX_BYTES))
        places = _places(_field(tree, "storage_data"))
        tensors, objects = {}, {}
        for name, entry in _field(tree, "state_dict_metadata").items():
            if isinstance(entry, Stub) and entry.name == f"{_MODULE}TensorStorageMetadata":
                tensors[_text(name)] = _tensor(name, entry, places)
            elif (name, None) in places:
                objects[_text(name)] = places[name, None]
            else:
                raise PickleError(f"nothing says where {_text(name)} lies")
        return DcpMetadata(tensors, objects, stubs)
    except OSError as error:
        raise UnreadableCheckpoint(path, f"cannot be read: {error.strerror}") from error
    except (PickleError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(path, f"is no metadata of a distributed checkpoint: {error}") from None


_Places = dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]


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
    if not isinstance(value, (tuple, list)) or not are_counts(value):
        raise PickleError("a shape or offset is no list of numbers from 0 up")
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
        key = _text(index.get("fqn")), None if offset is None else _numbers(offset)
        if key in found:
            raise PickleError(f"{key[0]} at {key[1]} lies in two places")
        found[key] = (file, first, length)
    return found


def _tensor(name: str, entry: Stub, places: _Places) -> DcpTensor:
    dtype = _dtype(entry.get("properties"))
    if dtype is None:
        raise PickleError(f"{name} has no dtype")
    chunks, size = [], _numbers(entry.get("size"))
    for chunk in entry.get("chunks") or ():
        if not isinstance(chunk, Stub):
            raise PickleError(f"{name}: a chunk is none")
        offsets, sizes = _numbers(chunk.get("offsets")), _numbers(chunk.get("sizes"))
        if not len(offsets) == len(sizes) == len(size) or any(map(_leaves, offsets, sizes, size)):
            raise PickleError(f"{name}: its chunk at {offsets} lies outside its shape {size}")
        if (name, offsets) not in places:
            raise PickleError(f"{name}: nothing says where its chunk at {offsets} lies")
        chunks.append(DcpChunk(offsets, sizes, *places[name, offsets]))
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
