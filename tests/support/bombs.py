"""What the tests of foreign pickles and of foreign archives make their bombs of."""

import itertools
import struct

SECONDS = 1
"""Of the processor. What is refused takes a fraction of it; what has no bound takes for ever."""


def text(value: str) -> bytes:
    """Pushes a string."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def doubled(levels: int, pair: bytes, start: bytes) -> bytes:
    """A value made of two of itself, so many times: 2**levels leaves, a few bytes a level."""
    return start + b"q\x00" + b"".join(b"0" + pair + b"q\x00" for _ in range(levels))


def of_one_hash(count: int) -> list[tuple[int, int]]:
    """Pairs of numbers of one hash in Python: the second undoes what the first did (xxHash's rounds, on 64 bits)."""
    one, two, five, bits = 11400714785074694791, 14029467366897019727, 2870177450012600261, (1 << 64) - 1
    found: list[tuple[int, int]] = []
    for first in itertools.count():
        state = five + first * two & bits
        state = (state << 31 | state >> 33) * one & bits
        second = (12345 - state) * pow(two, -1, 1 << 64) & bits
        if second < (1 << 61) - 1:
            found.append((first, second))
        if len(found) == count:
            assert len(set(map(hash, found))) == 1
            return found


OF_ONE_HASH = of_one_hash(20_000)
LISTS = doubled(90, b"](h\x00h\x00e", b"]")
