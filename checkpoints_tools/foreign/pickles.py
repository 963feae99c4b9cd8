"""Foreign pickles: what their names mean to a reader of checkpoints, and how they are written. Nothing is ever called.

What is on the list below becomes a plain value; every other global becomes a `Stub` that records its name and whatever
it was to be called with.
"""

import argparse
import io
import pickle
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from checkpoints_tools.foreign.machine import run
from checkpoints_tools.foreign.values import Global, Namespace, PickleError, Stub, Vocabulary, are_counts

_MAX_DIMENSIONS = 8

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_DTYPES = (*_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, eq=False)
class StorageType:
    """A class of storages, or the untyped one."""

    dtype: torch.dtype | None


class Storage(ABC):
    """What a persistent id stands for: bytes that tensors are views of."""

    @abstractmethod
    def tensor(self, dtype: torch.dtype | None, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """A view; offset and strides in elements, dtype None: that of the storage.

        Raises:
            PickleError: it does not lie in the storage.
        """


def _view(arguments: Sequence[Any]) -> Any:
    """torch._utils._rebuild_tensor and _v2: (storage, offset, shape, strides, ...)."""
    return _typed_view((*arguments[:4], None, None, None))


def _typed_view(arguments: Sequence[Any]) -> Any:
    """torch._utils._rebuild_tensor_v3: the seventh argument is the dtype."""
    storage, offset, shape, strides, _, _, dtype = arguments[:7]
    if isinstance(storage, Stub):
        return storage  # of a class that no weight has: quantized, sparse
    if not isinstance(storage, Storage) or not isinstance(dtype, (torch.dtype, type(None))):
        raise PickleError("a tensor has no storage or no dtype")
    if not isinstance(shape, (tuple, list)) or not isinstance(strides, (tuple, list)):
        raise PickleError("a tensor's shape or strides are no list")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise PickleError(f"a tensor of {len(shape)} dimensions has {len(strides)} strides")
    if not are_counts([offset, *shape, *strides]):
        raise PickleError("a tensor's offset, shape and strides are no numbers from 0 up")
    return storage.tensor(dtype, offset, tuple(shape), tuple(strides))


def _data(arguments: Sequence[Any]) -> Any:
    """torch._utils._rebuild_parameter and its like: the tensor is all that matters."""
    return arguments[0]


def _of_a_subclass(arguments: Sequence[Any]) -> Any:
    """torch._tensor._rebuild_from_type_v2, for tensors with attributes: (function, class, its arguments, state)."""
    function, _, inner = arguments[:3]
    if not isinstance(function, Global) or function.dotted not in _REBUILDS or not isinstance(inner, tuple):
        return Stub("torch._tensor._rebuild_from_type_v2", tuple(arguments))
    return _REBUILDS[function.dotted](inner)


_REBUILDS: dict[str, Callable[[Sequence[Any]], Any]] = {
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _typed_view,
    "torch._utils._rebuild_parameter": _data,
    "torch._utils._rebuild_parameter_with_state": _data,
    "torch.nn.parameter.Parameter": _data,
}

_DCP = "torch.distributed.checkpoint"
_VOCABULARY = Vocabulary(
    values={
        **{str(dtype): dtype for dtype in _DTYPES},
        **{f"torch.{name}": StorageType(dtype) for name, dtype in _STORAGES.items()},
        "torch.storage.UntypedStorage": StorageType(None),
    },
    makers={**_REBUILDS, "torch._tensor._rebuild_from_type_v2": _of_a_subclass},
    expected=frozenset(
        (
            *(f"{_DCP}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
            *(f"{_DCP}.metadata.{name}StorageMetadata" for name in ("Tensor", "Bytes", "Chunk")),
            f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
            f"{_DCP}.filesystem._StorageInfo",
            "torch.serialization._get_layout",
            "torch.memory_format",
            "torch.Tensor",
            "torch.device",
            "pathlib.PosixPath",
        )
    ),
)


def read_pickle(data: bytes, load_persistent: Callable[[Any], Any] | None = None) -> tuple[Any, tuple[str, ...]]:
    """The value of a pickle, and the names of classes that were not called.

    Args:
        data: the pickle.
        load_persistent: a storage from its persistent id; None: there are none.

    Raises:
        PickleError: it is damaged, or does what no checkpoint does.
    """
    return run(data, _VOCABULARY, load_persistent)


@dataclass(frozen=True, eq=False)
class PlannedStorage:
    """A storage that will lie in an archive under a key."""

    key: str
    dtype: torch.dtype
    elements: int


@dataclass(frozen=True, eq=False)
class PlannedView:
    """A whole storage as a contiguous tensor."""

    storage: PlannedStorage
    shape: tuple[int, ...]


class _Writer(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, PlannedStorage):
            return None
        name = next(name for name, dtype in _STORAGES.items() if dtype == obj.dtype)
        return ("storage", getattr(torch, name), obj.key, "cpu", obj.elements)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, PlannedView):
            strides: list[int] = []
            step = 1
            for extent in reversed(obj.shape):
                strides.append(step)
                step *= extent
            hooks: OrderedDict[str, Any] = OrderedDict()
            return torch._utils._rebuild_tensor_v2, (obj.storage, 0, obj.shape, tuple(strides[::-1]), False, hooks)
        if isinstance(obj, Namespace):
            return argparse.Namespace, (), obj.values
        return NotImplemented


def write_pickle(value: Any) -> bytes:
    """As torch.save pickles: PlannedView becomes a tensor, Namespace the one of argparse."""
    out = io.BytesIO()
    _Writer(out, protocol=2).dump(value)
    return out.getvalue()
