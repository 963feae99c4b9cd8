"""The order of samples as a pure function: sample n of a run to (source, the i-th sample of that source).

No state, no shuffle files: O(log sources) a sample, and a ledger at any n without counting.
"""

import heapq
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megalemur.data.history import History


class Draw(NamedTuple):
    """Where one sample comes from."""

    key: str
    """The source."""
    ordinal: int
    """How many samples of that source come before it, over all epochs and blends."""


@dataclass(frozen=True)
class _Node:
    """A source (leaf: `key` is set) or two subtrees; weights are whole numbers."""

    weight: int
    key: str = ""
    left: "_Node | None" = None
    right: "_Node | None" = None


def _tree(weights: Mapping[str, int]) -> _Node:
    """Huffman's tree (1952): every second level down it, the weight has at least halved."""
    heap = [(weight, number, _Node(weight, key)) for number, (key, weight) in enumerate(weights.items())]
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (a + b, number, _Node(a + b, left=left, right=right)))
        number += 1
    return heap[0][2]


def _left_of(node: _Node, m: int) -> int:
    """How many of the first m items at this node went left: m times its share, rounded to nearest."""
    assert node.left is not None
    return (2 * m * node.left.weight + node.weight) // (2 * node.weight)


class Deal:
    """Deals samples to weighted sources.

    After any m samples each source is less than 2 samples away from its share. Proof: at a node that has dealt M items,
    the left child has M a / w rounded to nearest, and the right one the rest, so a split adds an error of at most 1/2
    to the parent's error times the child's share of it. In Huffman's tree a node is at most half of its grandparent, so
    the errors of the levels above a source add up to less than (1 + 1 + 1/2 + 1/2 + 1/4 + ...) / 2 = 2.
    """

    def __init__(self, weights: Mapping[str, int]):
        """Build the tree.

        Args:
            weights: key to whole weight above 0, in an order that is a function of the keys alone.
        """
        self._root = _tree(weights)

    def __call__(self, m: int) -> Draw:
        """Source of the m-th sample (from 0), and how many of that source come before it."""
        node = self._root
        while node.left is not None and node.right is not None:
            before = _left_of(node, m)
            goes_left = _left_of(node, m + 1) > before
            node, m = (node.left, before) if goes_left else (node.right, m - before)
        return Draw(node.key, m)

    def counts(self, m: int) -> dict[str, int]:
        """Samples of each source among the first m."""
        found: dict[str, int] = {}
        ahead = [(self._root, m)]
        while ahead:
            node, items = ahead.pop()
            if node.left is None or node.right is None:
                found[node.key] = items
                continue
            left = _left_of(node, items)
            ahead += [(node.left, left), (node.right, items - left)]
        return found


class Order:
    """Sample n of a run, for all n: f(history, n).

    A change of blend starts a new deal, and every source goes on where it stood. So each source is within 2 samples of
    its share of every blend, and within 4 of the whole across one change.
    """

    def __init__(self, history: History):
        """Build one deal a blend, and where each source stands when it begins."""
        self.history = history
        self._begins = [blend.begins for blend in history.blends]
        self._deals = [Deal(blend.integer_weights()) for blend in history.blends]
        self._used: list[dict[str, int]] = [{}]
        for deal, begins, ends in zip(self._deals, self._begins, self._begins[1:], strict=False):
            self._used.append(_sum(self._used[-1], deal.counts(ends - begins)))

    def _blend_at(self, number: int) -> int:
        return bisect_right(self._begins, number) - 1

    def __call__(self, drawn: int) -> Draw:
        """Where the run's `drawn`-th sample (from 0) comes from; skipped samples are passed over."""
        number = self.history.number(drawn)
        k = self._blend_at(number)
        draw = self._deals[k](number - self._begins[k])
        return Draw(draw.key, draw.ordinal + self._used[k].get(draw.key, 0))

    def counts(self, drawn: int) -> dict[str, int]:
        """The ledger: samples of each source that are behind a run which has drawn `drawn` samples.

        Skipped samples among them are counted too: the source has moved past them. Sources of earlier blends stay in.
        """
        number = self.history.number(drawn - 1) + 1 if drawn else 0
        k = self._blend_at(number)
        return _sum(self._used[k], self._deals[k].counts(number - self._begins[k]))


def _sum(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in [*a, *(key for key in b if key not in a)]}
