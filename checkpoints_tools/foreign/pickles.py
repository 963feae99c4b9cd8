"""Foreign pickles: read without calling anything that they name, and written. The only module that knows the format.

What is on the list below becomes a plain value; every other global becomes a `Stub` that records its name and whatever
it was to be called with. Python's own pure reader is used, since it can be told which operations there are.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

MAX_BYTES = 256 << 20
"""Of a pickle: more than the metadata of any checkpoint, which holds no tensors."""
_MAX_DIMENSIONS = 8
_MAX_PAIRS = 64
"""Pairs that a dict may be called with; its items come one by one."""


class PickleError(ValueError):
    """Bytes that are no pickle, or one that no checkpoint has."""


@dataclass(eq=False)
class Stub:
    """In place of an object whose class was not called."""

    name: str
    """module.class"""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        # dataclasses with slots carry a pair: no dict, and the slots
        self.state = state[1] if isinstance(state, tuple) and len(state) == 2 and state[0] is None else state

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of the object, as its state has it."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


@dataclass(eq=False)
class Namespace:
    """argparse.Namespace: settings of a run by name."""

    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class StorageType:
    """A class of storages, or the untyped one."""

    dtype: torch.dtype | None


@dataclass(frozen=True, eq=False)
class View:
    """A tensor as a view of a storage; strides and offset in elements."""

    storage: Any
    """What the persistent id says."""
    dtype: torch.dtype | None
    """None: that of the storage."""
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


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
}
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float32", "float16", "bfloat16", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"),
        *("float8_e4m3fn", "float8_e5m2"),
    )
}


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(
        type(value) is int and 0 <= value < 1 << 62 for value in values
    ):
        raise PickleError(f"{values!r:.100} is no shape")
    return tuple(values)


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any, dtype: Any = None) -> View:
    (first,) = _whole_numbers((offset,))
    sizes, steps = _whole_numbers(shape), _whole_numbers(strides)
    if len(sizes) != len(steps):
        raise PickleError(f"a tensor of shape {sizes} has strides {steps}")
    return View(storage, dtype, first, sizes, steps)


def _typed_view(*arguments: Any) -> View:
    """torch._utils._rebuild_tensor_v3: the seventh argument is the dtype."""
    dtype = arguments[6] if len(arguments) > 6 else None
    return _view(*arguments[:4], dtype=dtype if isinstance(dtype, torch.dtype) else None)


def _data(data: Any, *_: Any) -> Any:
    """torch._utils._rebuild_parameter: the tensor is all that matters."""
    return data


def _size(values: Any = ()) -> tuple[int, ...]:
    return _whole_numbers(values)


class _Settings(Namespace):
    """Takes the state that argparse.Namespace would take."""

    def __setstate__(self, state: Any) -> None:
        self.values = state if isinstance(state, dict) else {}


class _Dict(dict[Any, Any]):
    """collections.OrderedDict and its kin; module state dicts carry attributes, which go."""

    def __init__(self, *arguments: Any):
        pairs = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], (list, tuple)) else ()
        if len(pairs) > _MAX_PAIRS:
            raise PickleError("a dict is made of a long list")
        super().__init__({_key(key): value for key, value in pairs})

    def __setstate__(self, state: Any) -> None:
        """Nothing of it is used."""


def _members(values: Any = ()) -> Any:
    """set and frozenset, as the list that they are made of: nothing is hashed or copied."""
    return values


_KNOWN: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_view,
    ("torch._utils", "_rebuild_tensor"): _view,
    ("torch._utils", "_rebuild_parameter"): _data,
    ("torch.nn.parameter", "Parameter"): _data,
    ("torch.storage", "UntypedStorage"): StorageType(None),
    **{("torch", name): StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): _Dict,
    ("collections", "defaultdict"): _Dict,
    ("argparse", "Namespace"): _Settings,
    ("builtins", "set"): _members,
    ("builtins", "frozenset"): _members,
    ("__builtin__", "set"): _members,
}
"""What is more than a stub. None of it does anything but keep what it is given."""

INERT = (
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex"),
            *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        )
    ),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "torch.memory_format",
    "pathlib.PosixPath",
)
"""Names whose stubs every reader expects; others are reported."""


def _key(value: Any) -> Any:
    """A key of a dict: a nest of tuples would take for ever to hash."""
    if isinstance(value, (str, int, bytes, float, type(None), Stub)):
        return value
    if isinstance(value, tuple) and len(value) < 16 and all(isinstance(v, (str, int, bytes)) for v in value):
        return value
    raise PickleError(f"a key of a dict is {type(value).__name__}")


def _stub_class(name: str) -> type:
    def create(cls: type, *arguments: Any) -> Any:
        return object.__new__(cls)

    def begin(self: Stub, *arguments: Any) -> None:
        Stub.__init__(self, name, arguments)

    return type("Stub", (Stub,), {"__new__": create, "__init__": begin})


class _Reader(pickle._Unpickler):
    """Python's reader with a list of names, and without any operation that could do or take much."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    load: Callable[[], Any]

    def __init__(self, data: bytes, load_persistent: Callable[[Any], Any]):
        super().__init__(io.BytesIO(data), encoding="utf-8", errors="replace")
        self._load_persistent = load_persistent
        self._stubs: dict[str, type] = {}

    @property
    def stubs(self) -> tuple[str, ...]:
        """Names of classes that were not called, but for those that a checkpoint has."""
        return tuple(sorted(set(self._stubs) - set(INERT)))

    def find_class(self, module: str, name: str) -> Any:
        """A plain value or a stub, never the global itself."""
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        full = f"{module}.{name}"[:500]
        return self._stubs.setdefault(full, _stub_class(full))

    def persistent_load(self, pid: Any) -> Any:
        """A storage."""
        return self._load_persistent(pid)

    def read_all(self) -> Any:
        """The object.

        Raises:
            PickleError: any defect.
        """
        try:
            return self.load()
        except PickleError:
            raise
        except RecursionError:
            raise PickleError("it is nested too deeply") from None
        except Exception as error:
            raise PickleError(f"{type(error).__name__}: {error}"[:300]) from None

    # the dispatch table of the class above, with those operations replaced that are not as they should be
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def _refused(self) -> None:
        raise PickleError("it has an operation that no checkpoint needs")

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        self.stack[-1] = self._called(function, arguments)

    def _new(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(self._called(function, arguments))

    def _new_with_names(self) -> None:
        self.stack.pop()
        self._new()

    def _called(self, function: Any, arguments: Any) -> Any:
        """Only what `find_class` gave out can be called: everything else in a pickle is a value."""
        ours = function in _CALLABLE or (isinstance(function, type) and issubclass(function, Stub))
        if not ours or not isinstance(arguments, tuple):
            raise PickleError(f"it calls {type(function).__name__}, which is no class")
        return function(*arguments)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put({_key(key): value})

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._put({_key(items[n]): items[n + 1] for n in range(0, len(items) - 1, 2)})

    def _put(self, items: dict[Any, Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(items)

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({_key(items[n]): items[n + 1] for n in range(0, len(items) - 1, 2)})

    def _set(self) -> None:
        self.append([])  # nothing is hashed

    def _add(self) -> None:
        items = self.pop_mark()
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _frozen(self) -> None:
        self.append(tuple(self.pop_mark()))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, (Stub, _Settings, _Dict)):
            target.__setstate__(state)


_CALLABLE = (_view, _typed_view, _data, _size, _members, _Dict, _Settings)

for _operation, _method in {
    pickle.REDUCE: _Reader._call,
    pickle.NEWOBJ: _Reader._new,
    pickle.NEWOBJ_EX: _Reader._new_with_names,
    pickle.SETITEM: _Reader._set_item,
    pickle.SETITEMS: _Reader._set_items,
    pickle.DICT: _Reader._dict,
    pickle.EMPTY_SET: _Reader._set,
    pickle.ADDITEMS: _Reader._add,
    pickle.FROZENSET: _Reader._frozen,
    pickle.BUILD: _Reader._build,
    **dict.fromkeys(
        (
            *(pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4),
            *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
        ),
        _Reader._refused,
    ),
}.items():
    _Reader.dispatch[_operation[0]] = _method


def read_pickle(data: bytes, load_persistent: Callable[[Any], Any] | None = None) -> tuple[Any, tuple[str, ...]]:
    """The value of a pickle, and the names of classes that were not called.

    Args:
        data: the pickle.
        load_persistent: a storage from its persistent id; None: there are none.

    Raises:
        PickleError: it is damaged, or does what no checkpoint does.
    """
    if len(data) > MAX_BYTES:
        raise PickleError(f"it has {len(data)} bytes, and no checkpoint more than {MAX_BYTES}")

    def none(pid: Any) -> Any:
        raise PickleError("it refers to a storage, and there is none")

    reader = _Reader(data, load_persistent or none)
    return reader.read_all(), reader.stubs


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
            import argparse

            return argparse.Namespace, (), obj.values
        return NotImplemented


def write_pickle(value: Any) -> bytes:
    """As torch.save pickles: PlannedView becomes a tensor, Namespace the one of argparse."""
    out = io.BytesIO()
    _Writer(out, protocol=2).dump(value)
    return out.getvalue()
