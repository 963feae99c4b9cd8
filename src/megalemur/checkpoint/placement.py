"""Who writes what: each element of the state once, bytes balanced over the ranks that hold it. Free of torch.

Every rank computes the same answer from the same claims; nothing is negotiated.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megalemur.checkpoint.cover import disjoint, gap
from megalemur.checkpoint.errors import CheckpointError
from megalemur.checkpoint.manifest import box_text
from megalemur.parallel.boxes import Box

MAX_LISTED = 20
MASTER = "master"  # parallel.state has the word, and imports torch


class Claim(NamedTuple):
    """A box of the state that some rank holds."""

    name: str
    kind: str
    box: Box


class Placed(NamedTuple):
    """A box that `rank` writes, out of the box `held` that it holds."""

    name: str
    kind: str
    box: Box
    held: Box
    rank: int

    @property
    def claim(self) -> Claim:
        """What the rank holds it as."""
        return Claim(self.name, self.kind, self.held)


def place(claims: Sequence[Sequence[Claim]], shapes: Mapping[str, tuple[int, ...]]) -> list[Placed]:
    """Choose an owner for every part of the state.

    Copies of one box are written once. Copies that are cut differently (a tied embedding on the first and the last
    stage, sharded over different replicas) are cut along each other's edges, and each part is written once.

    Args:
        claims: what each rank holds, in the order of ranks; boxes lie inside their tensors.
        shapes: every tensor of the model.

    Raises:
        CheckpointError: masters, or a kind of moment that any rank holds, do not cover every tensor; lists the gaps.
    """
    holders: dict[tuple[str, str], dict[Box, list[int]]] = {}
    for rank, held in enumerate(claims):
        for claim in held:
            ranks = holders.setdefault((claim.kind, claim.name), {}).setdefault(claim.box, [])
            if rank not in ranks[-1:]:
                ranks.append(rank)
    refuse_problems("the state to save does not cover the model", _uncovered(holders, shapes))
    shared, placed, load = [], [], [0] * len(claims)
    for (kind, name), boxes in sorted(holders.items()):
        for box, held_box in disjoint(list(boxes)):
            ranks = boxes[held_box]
            if len(ranks) == 1:
                load[ranks[0]] += box.size
                placed.append(Placed(name, kind, box, held_box, ranks[0]))
            else:
                shared.append((Placed(name, kind, box, held_box, -1), ranks))
    # the largest first: small ones even out what is left
    for part, ranks in sorted(shared, key=lambda item: (-item[0].box.size, item[0])):
        owner = min(ranks, key=lambda rank: (load[rank], rank))
        load[owner] += part.box.size
        placed.append(part._replace(rank=owner))
    return sorted(placed)


def _uncovered(
    holders: Mapping[tuple[str, str], Mapping[Box, list[int]]], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    problems = []
    for kind in sorted({kind for kind, _ in holders} | {MASTER}):
        for name, shape in shapes.items():
            boxes = [part for part, _ in disjoint(list(holders.get((kind, name), {})))]
            missing = gap(boxes, shape)
            if missing is not None:
                problems.append(f"{name} ({kind}): no rank holds {box_text(missing)} of shape {list(shape)}")
    return problems


def refuse_problems(what: str, problems: Sequence[str]) -> None:
    """Raise CheckpointError with all problems, or the first MAX_LISTED and how many more; nothing without any."""
    if not problems:
        return
    more = f"\n  … and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    listing = "".join(f"\n  - {problem}" for problem in problems[:MAX_LISTED])
    raise CheckpointError(f"{what}:{listing}{more}")
