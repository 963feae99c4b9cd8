"""Keyed permutations of range(n) in constant memory, and numbers drawn from a key.

A Feistel network (Luby and Rackoff 1988) over the smallest power of two that holds n, with cycle walking (Black and
Rogaway 2002) for what falls outside. For shuffling, not for secrets.
"""

import hashlib

import numpy as np

_ROUNDS = 8
_MASK = (1 << 64) - 1


def draw(*key: str | int, bits: int = 128) -> int:
    """A number of `bits` bits (at most 512, whole bytes) that is a function of the key alone."""
    text = "/".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=bits // 8).digest(), "little")


class Permutation:
    """A permutation of range(n): `p(i)` for one index, `p.many(indices)` for an array. Any size, 100 bytes."""

    def __init__(self, n: int, *key: str | int):
        """Choose the permutation.

        Args:
            n: size of the range, 1 to 2**62.
            key: what it is a function of; another key is another permutation.
        """
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"a permutation of {n} things; the range is 1 to 2**62")
        self.n = n
        bits = (n - 1).bit_length()
        # the halves may differ by a bit, so that less than half of the domain is walked over
        self._low_bits = bits - bits // 2
        self._masks = ((1 << self._low_bits) - 1, (1 << bits // 2) - 1)
        self._keys = [draw("permutation", n, r, *key, bits=64) for r in range(_ROUNDS)]

    def _once(self, x):
        """One pass over the power of two: a bijection, for int and for uint64 arrays (which wrap by themselves)."""
        halves = [x & self._masks[0], x >> self._low_bits]
        for number, key in enumerate(self._keys):
            side = number & 1
            # splitmix64's finaliser (Steele, Lea and Flood 2014) as the round function
            mixed = (halves[1 - side] + key) & _MASK
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
            halves[side] = halves[side] ^ ((mixed ^ (mixed >> 31)) & self._masks[side])
        return halves[0] | (halves[1] << self._low_bits)

    def __call__(self, i: int) -> int:
        """Where index i goes."""
        if not 0 <= i < self.n:
            raise IndexError(f"index {i} of a permutation of {self.n}")
        i = self._once(i)
        while i >= self.n:
            i = self._once(i)
        return i

    def many(self, indices: np.ndarray) -> np.ndarray:
        """Where each index goes, int64; all must be in range(n)."""
        moved = np.asarray(indices).astype(np.uint64)
        outside = np.ones(moved.shape, bool)
        while outside.any():
            moved[outside] = self._once(moved[outside])
            outside = moved >= self.n
        return moved.astype(np.int64)
