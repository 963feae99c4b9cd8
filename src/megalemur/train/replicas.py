"""Whether what must be equal on several ranks still is, bit by bit: replicas, tensor-parallel norms, a tied embedding.

Compares digests, computed where the tensors are. What this can and cannot catch: docs/guards.md.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megalemur.checkpoint.exchange import Peers
from megalemur.config.run import RunConfig
from megalemur.model.names import EMBEDDING
from megalemur.observe.observer import Event
from megalemur.optim.optimizer import Optimizer
from megalemur.parallel.groups import Place
from megalemur.parallel.state import Owned, Segment

_CHUNK_WORDS = 1 << 20
"""Words digested at once: 16 MiB of extra memory, for the words as int64 and for their weights."""
_ODD = 0x1E3779B97F4A7C15
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_SHOWN = 20
"""Differences that a message lists."""

Segments = Mapping[torch.nn.Parameter, Sequence[Segment]]


class Held(NamedTuple):
    """A tensor that other ranks must hold too."""

    name: str
    tensor: torch.Tensor


class Circle(NamedTuple):
    """Ranks that must hold the same, and what."""

    title: str
    group: dist.ProcessGroup
    held: Sequence[Held]


class Digester:
    """Digests of tensors on one device: a sum of words times odd weights that depend on the position, modulo 2^64.

    One flipped bit changes one word by a power of two below 2^32; times an odd number that is never 0 modulo 2^64, so a
    single flip is found with certainty; larger damage cancels out with the probability of a random hash collision.
    """

    def __init__(self, device: torch.device):
        numbers = torch.arange(_CHUNK_WORDS, dtype=torch.int64, device=device)
        self._weights = (2 * numbers + 1) * _ODD  # wraps around, which keeps them odd

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """int64 scalar on the tensor's device; a function of its bytes, the same in every process."""
        # words of one element each: a wider view would depend on where the tensor begins in its buffer
        words = tensor.detach().reshape(-1).view(_WORDS[tensor.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for chunk in words.split(_CHUNK_WORDS):
            total = total * _ODD + chunk.to(torch.int64).mul_(self._weights[: chunk.numel()]).sum()
        return total


class ReplicaCheck:
    """Compares every few steps, just before the update: parameters as the forward and backward pass used them."""

    def __init__(
        self,
        place: Place,
        circles: Callable[[], Sequence[Circle]],
        norms: Sequence[torch.Tensor] = (),
        *,
        every: int,
        steps_taken: int,
    ):
        """Set up.

        Args:
            place: this rank.
            circles: what must be equal now; the same circles, with the same tensors, on all ranks of each.
            norms: parameters that tensor-parallel ranks share, looked at in every step: the next update overwrites them
                from their masters, and they are small. None of them only where there are none on all ranks.
            every: steps between comparisons of everything; 0: nothing is ever compared.
            steps_taken: by the run so far, so that a restart compares in the same steps.
        """
        self._place, self._circles, self._norms = place, circles, norms
        self._every, self._steps = every, steps_taken
        self._digest: Digester | None = None

    def when_due(self) -> list[Event]:
        """`compare` in the steps that are due, and where the norms have come apart; called once a step."""
        self._steps += 1
        if not self._every:
            return []
        due = self._steps % self._every == 0
        return self.compare() if due or (self._norms and self._norms_differ()) else []

    def compare(self) -> list[Event]:
        """One event where anything differs, the same on all ranks. A collective."""
        found = [one for circle in self._circles() for one in self._differences(circle)]
        if not self._anywhere(bool(found)):
            return []
        said = Peers(self._place.cpu_group).all_gather({"label": self._place.label, "found": found})
        labels = [other["label"] for other in said]
        return [_event([one for other in said for one in other["found"]], labels)]

    def _norms_differ(self) -> bool:
        """Whether the norms of any tensor-parallel ranks differ; one digest over all of them. A collective."""
        rows = self._digests([torch.cat([norm.detach().reshape(-1) for norm in self._norms])], self._place.tp_group)
        return self._anywhere(bool((rows != rows[0]).any()))

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        anywhere = torch.tensor([here], dtype=torch.uint8)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=self._place.cpu_group)
        return bool(anywhere)

    def _digests(self, tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> torch.Tensor:
        """[rank of the group, tensor], on the CPU: the one sync of a comparison."""
        if self._digest is None:
            self._digest = Digester(self._place.device)
        mine = torch.stack([self._digest(tensor) for tensor in tensors])
        everyone = mine.new_empty(dist.get_world_size(group) * len(mine))
        dist.all_gather_into_tensor(everyone, mine, group=group)
        return everyone.view(-1, len(mine)).cpu()

    def _differences(self, circle: Circle) -> list[dict[str, Any]]:
        """What differs in a circle; told by its first rank alone."""
        rows = self._digests([held.tensor for held in circle.held], circle.group)
        if dist.get_rank(circle.group) != 0:
            return []
        ranks = dist.get_process_group_ranks(circle.group)
        return [
            {"tensor": held.name, "title": circle.title, "ranks": ranks, "digests": rows[:, number].tolist()}
            for number, held in enumerate(circle.held)
            if (rows[:, number] != rows[0, number]).any()
        ]


def suspects(digests: Sequence[int]) -> list[int]:
    """Positions of those that differ from more than half of all; of all, where no value has such a majority."""
    value, count = Counter(digests).most_common(1)[0]
    if 2 * count <= len(digests):
        return list(range(len(digests)))
    return [position for position, other in enumerate(digests) if other != value]


def _event(found: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Event:
    lines, ranks = [], set()
    for one in found:
        odd = [one["ranks"][position] for position in suspects(one["digests"])]
        ranks |= set(odd)
        who = " and ".join(f"rank {rank} ({labels[rank]})" for rank in odd)
        rest = [str(rank) for rank in one["ranks"] if rank not in odd]
        how = f"differs from {one['title']} {', '.join(rest)}" if rest else "differ, and no majority says who is right"
        lines.append(f"{one['tensor']}: {who} {how}")
    more = f"\n  - and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    text = "what must be equal is not:" + "".join(f"\n  - {line}" for line in lines[:_SHOWN]) + more
    facts: dict[str, bool | int | float | str] = {
        "ranks": ",".join(map(str, sorted(ranks))),
        "tensors": len(lines),
        "first": lines[0],
    }
    return Event("replicas", text, facts)


def norms_of(config: RunConfig, chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Parameters that every tensor-parallel rank holds in full; none where there is one such rank."""
    if config.parallel.tensor == 1:
        return []
    return [p for chunk in chunks for p in chunk.parameters() if not getattr(p, "tensor_model_parallel", False)]


def circles_of(
    config: RunConfig, place: Place, chunks: Sequence[torch.nn.Module], optimizer: Optimizer, segments: Segments
) -> list[Circle]:
    """What must be equal, and where, in this layout.

    Replicas hold the same parameters, and the same masters and moments where the optimizer is not distributed.
    Tensor-parallel ranks hold the same norms, with whatever masters and moments of them each owns; the first and the
    last stage the same tied embedding.
    """
    named = {p: _name(segments[p]) for chunk in chunks for p in chunk.parameters()}
    parameters = [Held(f"{name} (parameter)", p.data) for p, name in named.items()]
    owned = optimizer.owned()
    circles = []
    if dist.get_world_size(place.dp_cp_group) > 1:
        state = [] if config.parallel.distributed_optimizer else _states(owned, named)
        circles.append(Circle("replicas", place.dp_cp_group, [*parameters, *state]))
    if config.parallel.tensor > 1:
        norms = {p: named[p] for p in norms_of(config, chunks)}
        circles.append(Circle("tensor-parallel ranks", place.tp_group, _all_of(norms, owned)))
    ends = place.embedding_group if config.model.tie_embeddings and config.parallel.pipeline > 1 else None
    if ends is not None:
        tied = {p: name for p, name in named.items() if name == EMBEDDING}
        circles.append(Circle("pipeline ends", ends, _all_of(tied, owned)))
    return [circle for circle in circles if circle.held]


def _name(segments: Sequence[Segment]) -> str:
    return " + ".join(dict.fromkeys(segment.name for segment in segments)) or "padding of the vocabulary"


def _all_of(named: Mapping[torch.nn.Parameter, str], owned: Sequence[Owned]) -> list[Held]:
    parameters = [Held(f"{name} (parameter)", p.data) for p, name in named.items()]
    return parameters + _states(owned, named)


def _states(owned: Sequence[Owned], named: Mapping[torch.nn.Parameter, str]) -> list[Held]:
    """Masters and moments of the named parameters; a master that is the parameter itself is left out."""
    return [
        Held(f"{named[part.parameter]} ({kind})", tensor)
        for part in owned
        if part.parameter in named
        for kind, tensor in part.tensors.items()
        if tensor.data_ptr() != part.parameter.data_ptr()
    ]
