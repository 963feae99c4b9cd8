"""Puts the values of a pickle together that anybody may have made, and runs nothing of it.

A pickle is a program. Python's own reader can be told which classes to load, but it still hashes keys that take for
ever, copies a list as often as the file asks for it, and has no end of steps. So `pickletools` takes the bytes apart,
and a stack machine that knows values only puts them together: it imports nothing, and no class or function that the
file names is ever called. Objects become `Stub`: a name and its parts.
"""

import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_STEPS = 10_000_000
"""Opcodes of one pickle, and what long copies cost: the metadata of a large model takes a tenth of it."""
MAX_TEXT_BYTES = 64 << 20
"""All strings and bytes of one pickle."""
_MAX_INTEGER_BITS = 256
_MAX_KEY_PARTS = 16
_COPY_STEPS = 8


class Global(NamedTuple):
    """A name that a pickle asks for: a class, a function. Nothing stands behind it."""

    module: str
    name: str

    @property
    def dotted(self) -> str:
        """As one would write it."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Stub:
    """In place of an object that was never made: the name of its class or function, what that was to be called with,
    and the state that it was to have. As a key it equals nothing but itself."""

    name: str
    """module.class"""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of the object, as its state has it."""
        # dataclasses with slots carry a pair: no dict, and the slots
        pair = isinstance(self.state, tuple) and len(self.state) == 2 and self.state[0] is None
        state = self.state[1] if pair else self.state
        return state.get(name, default) if isinstance(state, dict) else default


@dataclass(eq=False)
class Namespace:
    """argparse.Namespace: settings of a run by name."""

    values: dict[str, Any] = field(default_factory=dict)


class PickleError(ValueError):
    """Bytes that are no pickle, or one that no checkpoint has."""


Maker = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Vocabulary:
    """The names that mean something; all others become stubs, and are reported."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """Name to the value it stands for."""
    makers: Mapping[str, Maker] = field(default_factory=dict)
    """Name to what makes a plain value of the arguments, instead of what the name really is."""
    expected: frozenset[str] = frozenset()
    """Names whose stubs every reader expects."""


def run(
    data: bytes, vocabulary: Vocabulary, persistent: Callable[[Any], Any] | None = None
) -> tuple[Any, tuple[str, ...]]:
    """The value of a pickle, and the names that mean nothing here, sorted.

    Args:
        data: the pickle.
        vocabulary: what names mean.
        persistent: what a persistent id stands for; None: there are none.

    Raises:
        PickleError: it is damaged, beyond the limits, or does what no checkpoint does.
    """
    try:
        return _Machine(vocabulary, persistent).run(data)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise PickleError(f"{type(error).__name__}: {error}"[:300]) from None


_SCALARS = (str, int, bool, bytes, type(None), Global)


def _is_key(value: Any) -> bool:
    """Whether hashing it takes no time and runs no code: nested tuples can take for ever."""
    if isinstance(value, tuple) and not isinstance(value, Global):
        return len(value) <= _MAX_KEY_PARTS and all(isinstance(part, _SCALARS) for part in value)
    if isinstance(value, int):
        return abs(value) < 1 << 60
    return isinstance(value, (*_SCALARS, Stub))


class _Machine:
    """The stack, the memo, and what was used up."""

    def __init__(self, vocabulary: Vocabulary, persistent: Callable[[Any], Any] | None):
        self._vocabulary, self._persistent = vocabulary, persistent
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._unknown: set[str] = set()
        self._steps = self._text = 0

    def run(self, data: bytes) -> tuple[Any, tuple[str, ...]]:
        """All opcodes up to STOP."""
        for opcode, argument, _ in pickletools.genops(data):
            self._steps += 1
            if self._steps > MAX_STEPS:
                raise PickleError(f"it takes more than {MAX_STEPS} steps")
            name = opcode.name
            if name in _PUSHED:
                self._push_value(argument)
            elif name == "STOP":
                break
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, argument)
            else:
                raise PickleError(f"it uses {name}, which no checkpoint needs")
        return self._stack.pop(), tuple(sorted(self._unknown))

    def _push_value(self, value: Any) -> None:
        if isinstance(value, (str, bytes, bytearray)):
            self._text += len(value)
            if self._text > MAX_TEXT_BYTES:
                raise PickleError(f"it has more than {MAX_TEXT_BYTES} bytes of text")
        elif isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
            raise PickleError(f"it has an integer of {value.bit_length()} bits")
        self._stack.append(value)

    def spend(self, elements: Sequence[Any]) -> None:
        """Charge a copy, so that many copies of one long list come to an end; shapes are short and cost nothing."""
        self._steps += _COPY_STEPS * max(0, len(elements) - _MAX_KEY_PARTS)
        if self._steps > MAX_STEPS:
            raise PickleError(f"it takes more than {MAX_STEPS} steps")

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        found, self._stack = self._stack, self._below.pop()
        return found

    def _named(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("a global's name is no text")
        # protocol 2 keeps Python 2's name of the module
        found = Global("builtins" if module == "__builtin__" else module, name)
        known, dotted = self._vocabulary, found.dotted
        if dotted in known.values:
            return known.values[dotted]
        if dotted not in known.makers and dotted not in known.expected and dotted not in _PLAIN:
            self._unknown.add(dotted[:200])
        return found

    def _made(self, what: Any, arguments: Any) -> Any:
        """What stands for the object that this would be called to make."""
        if not isinstance(what, Global):
            raise PickleError(f"it calls a value of type {type(what).__name__}")
        if not isinstance(arguments, (tuple, list)):
            raise PickleError(f"{what.dotted} is called with no list of arguments")
        if what.dotted in self._vocabulary.makers:
            return self._vocabulary.makers[what.dotted](arguments)
        if what.dotted in _PLAIN:
            return _PLAIN[what.dotted](self, arguments)
        return Stub(what.dotted, tuple(arguments))

    def put(self, target: Any, items: Sequence[Any]) -> None:
        """Set items, given as key, value, key, value ..., of a dict; a stub drops them."""
        if len(items) % 2 or not isinstance(target, (dict, Stub)):
            raise PickleError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not _is_key(key):
                raise PickleError(f"a {type(key).__name__} is no key that a checkpoint needs")
            if isinstance(target, dict):
                target[key] = value

    def unique(self, items: Sequence[Any]) -> set[Any]:
        """A set of these."""
        self.spend(items)
        if not all(map(_is_key, items)):
            raise PickleError("a set holds what no checkpoint needs")
        return set(items)

    def _extend(self, items: Sequence[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, (list, Stub)):
            raise PickleError(f"it appends to a {type(target).__name__}")
        if isinstance(target, list):
            target.extend(items)

    # opcodes, each with its argument

    def _empty(self, make: Callable[[], Any]) -> None:
        self._stack.append(make())

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self.put(self._stack[-1], [key, value])

    def _setitems(self, _: Any) -> None:
        items = self._since_mark()
        self.put(self._stack[-1], items)

    def _additems(self, _: Any) -> None:
        items = self._since_mark()
        if not isinstance(self._stack[-1], (set, Stub)):
            raise PickleError(f"it adds to a {type(self._stack[-1]).__name__}")
        if isinstance(self._stack[-1], set):
            self._stack[-1].update(self.unique(items))

    def _dict(self, _: Any) -> None:
        items = self._since_mark()
        made: dict[Any, Any] = {}
        self.put(made, items)
        self._stack.append(made)

    def _list(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(items)

    def _tuple(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _last(self, count: int) -> None:
        if len(self._stack) < count:
            raise PickleError("its stack is empty")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _frozenset(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(frozenset(self.unique(items)))

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _global(self, names: str) -> None:
        module, _, name = names.partition(" ")
        self._stack.append(self._named(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(self._named(module, name))

    def _reduce(self, _: Any) -> None:
        arguments, what = self._stack.pop(), self._stack.pop()
        self._stack.append(self._made(what, arguments))

    def _newobj_ex(self, _: Any) -> None:
        keywords, arguments, what = self._stack.pop(), self._stack.pop(), self._stack.pop()
        made = self._made(what, arguments)
        if isinstance(made, Stub):
            made.state = keywords
        self._stack.append(made)

    def _inst(self, names: str) -> None:
        module, _, name = names.partition(" ")
        arguments = self._since_mark()
        self._stack.append(self._made(self._named(module, name), arguments))

    def _obj(self, _: Any) -> None:
        what, *arguments = self._since_mark()
        self._stack.append(self._made(what, arguments))

    def _build(self, _: Any) -> None:
        # a dict's or a tensor's attributes are nothing that a checkpoint's reader wants
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Stub):
            target.state = state
        elif isinstance(target, Namespace) and isinstance(state, dict):
            target.values = state

    def _persid(self, _: Any) -> None:
        if self._persistent is None:
            raise PickleError("it refers to things outside itself")
        self._stack.append(self._persistent(self._stack.pop()))


def _ordered_dict(machine: _Machine, arguments: Sequence[Any]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    pairs = arguments[0] if arguments else ()
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise PickleError("an OrderedDict is made of no list of pairs")
    machine.spend(pairs)
    machine.put(made, [part for pair in pairs for part in pair])
    return made


def _elements(arguments: Sequence[Any]) -> Sequence[Any]:
    """The one list that a set or a Size is made of."""
    (elements,) = arguments or ((),)
    if not isinstance(elements, (list, tuple)):
        raise PickleError(f"a collection is made of a {type(elements).__name__}")
    return elements


def _size(machine: _Machine, arguments: Sequence[Any]) -> tuple[int, ...]:
    elements = _elements(arguments)
    machine.spend(elements)
    if not are_counts(elements):
        raise PickleError("a torch.Size holds what is no size")
    return tuple(elements)


def _encoded(machine: _Machine, arguments: Sequence[Any]) -> bytes:
    """Bytes as protocol 2 writes them: text of code points up to 255."""
    text, encoding = arguments
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise PickleError("_codecs.encode is used for what is no bytes")
    machine.spend(text)
    return text.encode("latin-1")


_PLAIN: dict[str, Callable[[_Machine, Sequence[Any]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    # the factory is never called: a checkpoint's reader asks for keys that are there
    "collections.defaultdict": lambda machine, arguments: {},
    "builtins.set": lambda machine, arguments: machine.unique(_elements(arguments)),
    "builtins.frozenset": lambda machine, arguments: frozenset(machine.unique(_elements(arguments))),
    "torch.Size": _size,
    "argparse.Namespace": lambda machine, arguments: Namespace(),
    "_codecs.encode": _encoded,
}
"""What is as harmless as a list: made here of what would be its arguments."""


def are_counts(values: Any) -> bool:
    """Whether this is a list or tuple of whole numbers from 0 up, each small enough for a file's size."""
    return isinstance(values, (list, tuple)) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


_PUSHED = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    )
)
"""Opcodes whose argument is the value."""

# the methods are the machine's own: this table is a part of it
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "NONE": lambda machine, _: machine._stack.append(None),
    "NEWTRUE": lambda machine, _: machine._stack.append(True),
    "NEWFALSE": lambda machine, _: machine._stack.append(False),
    "EMPTY_LIST": lambda machine, _: machine._empty(list),
    "EMPTY_TUPLE": lambda machine, _: machine._empty(tuple),
    "EMPTY_DICT": lambda machine, _: machine._empty(dict),
    "EMPTY_SET": lambda machine, _: machine._empty(set),
    "TUPLE1": lambda machine, _: machine._last(1),
    "TUPLE2": lambda machine, _: machine._last(2),
    "TUPLE3": lambda machine, _: machine._last(3),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine._put),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine._reduce),
    "MARK": _Machine._mark,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._setitem,
    "SETITEMS": _Machine._setitems,
    "ADDITEMS": _Machine._additems,
    "DICT": _Machine._dict,
    "LIST": _Machine._list,
    "TUPLE": _Machine._tuple,
    "FROZENSET": _Machine._frozenset,
    "POP": _Machine._pop,
    "POP_MARK": _Machine._pop_mark,
    "DUP": _Machine._dup,
    "MEMOIZE": _Machine._memoize,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "NEWOBJ_EX": _Machine._newobj_ex,
    "INST": _Machine._inst,
    "OBJ": _Machine._obj,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persid,
}
