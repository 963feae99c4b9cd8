"""Puts the values of a pickle together that anybody may have made, and runs nothing of it.

A pickle is a program. Python's own reader can be told which classes to load, but it still hashes keys that take for
ever, copies a list as often as the file asks for it, and has no end of steps. So a stack machine that knows values only
puts them together: it imports nothing, and no class or function that the file names is ever called. Objects become
`Stub`: a name and its parts.

What a pickle costs is in proportion to its bytes, whatever it claims. Opcodes are steps, those that take longer are
several, each element of a list that is copied is another, and there are no more of them than STEPS_PER_BYTE grants the
bytes that were read so far. Nothing is allocated for a length that the file does not have; memos are filled in their
order; of keys whose hash a file can choose there are a few. What only protocol 0 writes is unknown: torch writes 2 and
later ones.
"""

import gc
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from checkpoints_tools.foreign.values import Global, Namespace, PickleError, Stub, Vocabulary, are_counts

FREE_STEPS = 50_000
"""Of every pickle, besides those of its bytes: a small one may be dense."""
STEPS_PER_BYTE = 0.8
"""Of opcodes, and as much of what they are charged besides. Lists of a tensor's chunks, the densest that torch writes,
have 0.66 opcodes in a byte."""
_CALL_STEPS, _MAKER_STEPS, _GLOBAL_STEPS = 5, 8, 8
_TUPLE_STEPS, _LIST_STEPS, _SET_STEPS = 1, 2, 4
"""Of something that takes room, however short it is."""
_BYTES_OF_A_STEP = 1024
"""Of text that is copied."""
_MAX_INTEGER_BYTES = 32
_MAX_NAME = 256
"""Characters of a module, or of a class in it."""
_MAX_KEY_TEXT, _MAX_KEY_PARTS = 1024, 16
_MAX_CHOSEN_KEYS = 2000
"""Numbers beyond 16 bits and tuples with numbers: one can make many of one hash."""


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
        with _no_collections():
            return _Machine(data, vocabulary, persistent).run()
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise PickleError(f"{type(error).__name__}: {error}"[:300]) from None


_SCALARS = (str, bytes, int, bool, type(None))


@contextmanager
def _no_collections() -> Iterator[None]:
    """Nothing becomes garbage in between, and looking for it again and again takes longer than the rest."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Machine:
    """The stack, the memo, and what was used up."""

    def __init__(self, data: bytes, vocabulary: Vocabulary, persistent: Callable[[Any], Any] | None):
        self._data, self._vocabulary, self._persistent = data, vocabulary, persistent
        self._at = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: list[Any] = []
        self._unknown: set[str] = set()
        self._spent, self._granted = 0, FREE_STEPS
        self._chosen_keys = 0

    def run(self) -> tuple[Any, tuple[str, ...]]:
        """All opcodes up to STOP."""
        data, size, operations = self._data, len(self._data), _OPERATIONS
        steps = 0
        while self._at < size:
            code = data[self._at]
            self._at += 1
            steps += 1
            if steps > self._granted:
                self._grant(steps)
            if code == _STOP:
                return self._stack.pop(), tuple(sorted(self._unknown))
            operation = operations[code]
            if operation is None:
                raise PickleError(f"it uses opcode {bytes([code])!r}, which no checkpoint needs")
            operation(self)
        raise PickleError("it is cut short")

    def spend(self, steps: int) -> None:
        """Charge what takes longer or more room than an opcode, before it is done."""
        self._spent += steps
        if self._spent > self._granted:
            self._grant(self._spent)

    def _grant(self, steps: int) -> None:
        self._granted = FREE_STEPS + int(STEPS_PER_BYTE * self._at)
        if steps > self._granted:
            raise PickleError(f"it takes more than {self._granted} steps in its first {self._at} bytes")

    # arguments of opcodes

    def take(self, count: int) -> bytes:
        """The next bytes."""
        start = self._at
        self._at += count
        if count < 0 or self._at > len(self._data):
            raise PickleError("it is cut short")
        return self._data[start : self._at]

    def number(self, form: struct.Struct) -> Any:
        """The next number."""
        (found,) = form.unpack_from(self._data, self._at)
        self._at += form.size
        return found

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + _MAX_NAME + 1)
        if end < 0:
            raise PickleError(f"a name has no end, or more than {_MAX_NAME} characters")
        found = self._data[self._at : end].decode()
        self._at = end + 1
        return found

    # values

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def _integer(self, size: struct.Struct) -> None:
        count = self.number(size)
        if not 0 <= count <= _MAX_INTEGER_BYTES:
            raise PickleError(f"it has an integer of {count} bytes")
        self._stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def _empty(self, made: Any, steps: int) -> None:
        self.spend(steps)
        self._stack.append(made)

    def _mark(self) -> None:
        self.spend(_TUPLE_STEPS)
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        found, self._stack = self._stack, self._below.pop()
        return found

    def _named(self, module: Any, name: Any) -> Any:
        self.spend(_GLOBAL_STEPS)
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("a global's name is no text")
        if len(module) > _MAX_NAME or len(name) > _MAX_NAME:
            raise PickleError(f"a global's name has more than {_MAX_NAME} characters")
        # protocol 2 keeps Python 2's name of the module
        found = Global("builtins" if module == "__builtin__" else module, name)
        known, dotted = self._vocabulary, found.dotted
        if dotted in known.values:
            return known.values[dotted]
        if dotted not in known.makers and dotted not in known.expected and dotted not in _PLAIN:
            self._unknown.add(dotted)
        return found

    def _made(self, what: Any, arguments: Any) -> Any:
        """What stands for the object that this would be called to make."""
        if not isinstance(what, Global):
            raise PickleError(f"it calls a value of type {type(what).__name__}")
        dotted, known = what.dotted, self._vocabulary
        if not isinstance(arguments, tuple):
            raise PickleError(f"{dotted} is called with no tuple of arguments")
        if dotted in known.makers:
            self.spend(_MAKER_STEPS)
            return known.makers[dotted](arguments)
        self.spend(_CALL_STEPS)
        if dotted in _PLAIN:
            return _PLAIN[dotted](self, arguments)
        return Stub(dotted, arguments)

    def _is_key(self, value: Any) -> bool:
        """Whether hashing it takes no time and runs no code, and meets no crowd of others with its hash."""
        if isinstance(value, (str, bytes)):
            return len(value) <= _MAX_KEY_TEXT
        if isinstance(value, int):
            self._chosen_keys += not -0x10000 < value < 0x10000
        elif isinstance(value, tuple) and not isinstance(value, Global):
            self._chosen_keys += 1
            return len(value) <= _MAX_KEY_PARTS and all(
                isinstance(part, Global) or (isinstance(part, _SCALARS) and self._is_key(part)) for part in value
            )
        elif value is not None and not isinstance(value, (Global, Stub)):
            return False
        if self._chosen_keys > _MAX_CHOSEN_KEYS:
            raise PickleError(f"it has more than {_MAX_CHOSEN_KEYS} keys that are large numbers or tuples")
        return True

    def put(self, target: Any, items: Sequence[Any]) -> None:
        """Set items, given as key, value, key, value ..., of a dict; a stub drops them."""
        if len(items) % 2 or not isinstance(target, (dict, Stub)):
            raise PickleError(f"it sets items of a {type(target).__name__}")
        for number in range(0, len(items), 2):
            key = items[number]
            if not self._is_key(key):
                raise PickleError(f"a {type(key).__name__} is no key that a checkpoint needs")
            if isinstance(target, dict):
                target[key] = items[number + 1]

    def unique(self, items: Sequence[Any]) -> set[Any]:
        """A set of these."""
        self.spend(_SET_STEPS + len(items))
        if not all(map(self._is_key, items)):
            raise PickleError("a set holds what no checkpoint needs")
        return set(items)

    def _extend(self, items: Sequence[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, (list, Stub)):
            raise PickleError(f"it appends to a {type(target).__name__}")
        if isinstance(target, list):
            target.extend(items)

    # opcodes

    def _append(self) -> None:
        self._extend([self._stack.pop()])

    def _appends(self) -> None:
        self._extend(self._since_mark())

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self.put(self._stack[-1], [key, value])

    def _setitems(self) -> None:
        items = self._since_mark()
        self.put(self._stack[-1], items)

    def _additems(self) -> None:
        items = self._since_mark()
        if not isinstance(self._stack[-1], (set, Stub)):
            raise PickleError(f"it adds to a {type(self._stack[-1]).__name__}")
        if isinstance(self._stack[-1], set):
            self._stack[-1].update(self.unique(items))

    def _dict(self) -> None:
        items = self._since_mark()
        made: dict[Any, Any] = {}
        self.put(made, items)
        self._stack.append(made)

    def _list(self) -> None:
        items = self._since_mark()
        self._stack.append(items)

    def _tuple(self) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _last(self, count: int) -> None:
        if len(self._stack) < count:
            raise PickleError("its stack is empty")
        self.spend(_TUPLE_STEPS)
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _frozenset(self) -> None:
        items = self._since_mark()
        self._stack.append(frozenset(self.unique(items)))

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _pop_mark(self) -> None:
        self._since_mark()

    def _dup(self) -> None:
        self._stack.append(self._stack[-1])

    def _get(self, form: struct.Struct) -> None:
        self._stack.append(self._memo[self.number(form)])

    def _put(self, form: struct.Struct) -> None:
        index = self.number(form)
        if index > len(self._memo):
            raise PickleError(f"it fills place {index} of its memo after {len(self._memo)}")
        self._memo[index : index + 1] = [self._stack[-1]]

    def _memoize(self) -> None:
        self._memo.append(self._stack[-1])

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._stack.append(self._named(module, name))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(self._named(module, name))

    def _reduce(self) -> None:
        arguments, what = self._stack.pop(), self._stack.pop()
        self._stack.append(self._made(what, arguments))

    def _newobj_ex(self) -> None:
        keywords, arguments, what = self._stack.pop(), self._stack.pop(), self._stack.pop()
        made = self._made(what, arguments)
        if isinstance(made, Stub):
            made.state = keywords
        self._stack.append(made)

    def _inst(self) -> None:
        module, name = self._line(), self._line()
        arguments = self._since_mark()
        self._stack.append(self._made(self._named(module, name), tuple(arguments)))

    def _obj(self) -> None:
        what, *arguments = self._since_mark()
        self._stack.append(self._made(what, tuple(arguments)))

    def _build(self) -> None:
        # a dict's or a tensor's attributes are nothing that a checkpoint's reader wants
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Stub):
            target.state = state
        elif isinstance(target, Namespace) and isinstance(state, dict):
            target.values = state

    def _persid(self) -> None:
        if self._persistent is None:
            raise PickleError("it refers to things outside itself")
        self.spend(_MAKER_STEPS)
        self._stack.append(self._persistent(self._stack.pop()))


def _ordered_dict(machine: _Machine, arguments: Sequence[Any]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    pairs = arguments[0] if arguments else ()
    if not isinstance(pairs, (list, tuple)):
        raise PickleError("an OrderedDict is made of no list of pairs")
    machine.spend(2 * len(pairs))
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise PickleError("an OrderedDict is made of no list of pairs")
    machine.put(made, [part for pair in pairs for part in pair])
    return made


def _elements(arguments: Sequence[Any]) -> Sequence[Any]:
    """The one list that a set or a Size is made of."""
    if len(arguments) > 1 or not isinstance(elements := arguments[0] if arguments else (), (list, tuple)):
        raise PickleError("a collection is made of no list")
    return elements


def _size(machine: _Machine, arguments: Sequence[Any]) -> tuple[int, ...]:
    elements = _elements(arguments)
    machine.spend(len(elements))
    if not are_counts(elements):
        raise PickleError("a torch.Size holds what is no size")
    return tuple(elements)


def _encoded(machine: _Machine, arguments: Sequence[Any]) -> bytes:
    """Bytes as protocol 2 writes them: text of code points up to 255."""
    text, encoding = arguments
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise PickleError("_codecs.encode is used for what is no bytes")
    machine.spend(len(text) // _BYTES_OF_A_STEP)
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


_Operation = Callable[[_Machine], None]
_BYTE, _SHORT, _WORD, _LONG = struct.Struct("B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_SIGNED, _DOUBLE = struct.Struct("<i"), struct.Struct(">d")


def _constant(value: Any) -> _Operation:
    return lambda machine: machine.push(value)


def _number(form: struct.Struct) -> _Operation:
    return lambda machine: machine.push(machine.number(form))


def _counted(size: struct.Struct, made: Callable[[bytes], Any]) -> _Operation:
    """So many bytes, as a value."""
    return lambda machine: machine.push(made(machine.take(machine.number(size))))


def _skipped(form: struct.Struct) -> _Operation:
    """What only helps a reader that reads ahead, or says for whom it was written."""

    def skip(machine: _Machine) -> None:
        machine.number(form)

    return skip


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _latin1(data: bytes) -> str:
    return data.decode("latin-1")


_STOP = ord(".")
# opcodes by the names that pickletools has for them; the methods are the machine's own: this table is a part of it
_NAMED: dict[bytes, _Operation] = {
    **{b"\x80": _skipped(_BYTE), b"\x95": _skipped(_LONG)},  # PROTO, FRAME
    **{b"N": _constant(None), b"\x88": _constant(True), b"\x89": _constant(False), b")": _constant(())},
    b"]": lambda machine: machine._empty([], _LIST_STEPS),
    b"}": lambda machine: machine._empty({}, _LIST_STEPS),
    b"\x8f": lambda machine: machine._empty(set(), _SET_STEPS),
    # BININT, BININT1, BININT2, LONG1, LONG4, BINFLOAT
    **{b"J": _number(_SIGNED), b"K": _number(_BYTE), b"M": _number(_SHORT), b"G": _number(_DOUBLE)},
    **{b"\x8a": lambda machine: machine._integer(_BYTE), b"\x8b": lambda machine: machine._integer(_SIGNED)},
    # BINUNICODE, SHORT_BINUNICODE, BINUNICODE8; BINSTRING, SHORT_BINSTRING; BINBYTES, SHORT_BINBYTES, BINBYTES8
    **{b"X": _counted(_WORD, _utf8), b"\x8c": _counted(_BYTE, _utf8), b"\x8d": _counted(_LONG, _utf8)},
    **{b"T": _counted(_SIGNED, _latin1), b"U": _counted(_BYTE, _latin1)},
    **{b"B": _counted(_WORD, bytes), b"C": _counted(_BYTE, bytes), b"\x8e": _counted(_LONG, bytes)},
    # BINGET, LONG_BINGET, BINPUT, LONG_BINPUT, MEMOIZE
    **{b"h": lambda machine: machine._get(_BYTE), b"j": lambda machine: machine._get(_WORD)},
    **{b"q": lambda machine: machine._put(_BYTE), b"r": lambda machine: machine._put(_WORD)},
    b"\x94": _Machine._memoize,
    **{b"\x85": lambda m: m._last(1), b"\x86": lambda m: m._last(2), b"\x87": lambda m: m._last(3)},  # TUPLE1 to 3
    **{b"(": _Machine._mark, b"t": _Machine._tuple, b"l": _Machine._list, b"d": _Machine._dict},
    **{b"a": _Machine._append, b"e": _Machine._appends, b"s": _Machine._setitem, b"u": _Machine._setitems},
    **{b"\x90": _Machine._additems, b"\x91": _Machine._frozenset},
    **{b"0": _Machine._pop, b"1": _Machine._pop_mark, b"2": _Machine._dup},
    **{b"c": _Machine._global, b"\x93": _Machine._stack_global},
    **{
        b"R": _Machine._reduce,
        b"\x81": _Machine._reduce,
        b"\x92": _Machine._newobj_ex,
    },  # NEWOBJ takes what REDUCE does
    **{b"i": _Machine._inst, b"o": _Machine._obj, b"b": _Machine._build, b"Q": _Machine._persid},
}
_OPERATIONS: tuple[_Operation | None, ...] = tuple(_NAMED.get(bytes([code])) for code in range(256))
