"""Values that pickles are made of here: plain ones, and what stands in the place of objects that are never made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Global(NamedTuple):
    """A name that a pickle asks for: a class, a function. Nothing stands behind it."""

    module: str
    name: str

    @property
    def dotted(self) -> str:
        """As one would write it."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True, repr=False)
class Stub:
    """In place of an object that was never made: the name of its class or function, what that was to be called with,
    and the state that it was to have. As a key it equals nothing but itself."""

    name: str
    """module.class"""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __repr__(self) -> str:
        return f"Stub({self.name[:200]})"  # the rest can be as large as a file wants it to be

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


def are_counts(values: Any) -> bool:
    """Whether this is a list or tuple of whole numbers from 0 up, each small enough for a file's size."""
    return isinstance(values, (list, tuple)) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


MAX_VALUES, MAX_DEPTH = 200_000, 16
"""Of an archive's tree: all weights and moments of 405 billion parameters are 20,000, their settings a few thousand."""


def refuse_unfolding(tree: Any) -> None:
    """Refuse values that are small in the file and without end for whoever walks, compares or prints them: lists that
    hold themselves, or one list so many times that holds another so many times.

    Raises:
        PickleError: there are more than MAX_VALUES, or they lie deeper than MAX_DEPTH.
    """
    left, seen = [(tree, 0)], 0
    while left:
        value, depth = left.pop()
        if isinstance(value, Namespace):
            value = value.values
        if type(value) not in (dict, list, tuple):
            continue
        seen += 1 + len(value)
        if depth > MAX_DEPTH or seen > MAX_VALUES:
            raise PickleError(f"its values are more than {MAX_VALUES}, or lie deeper in each other than {MAX_DEPTH}")
        left += [(inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value)]
