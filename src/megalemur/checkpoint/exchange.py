"""What the ranks of a save or load tell each other, over a CPU process group: JSON bytes and tensors.

No `*_object` collective: those unpickle what arrives.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megalemur.checkpoint.errors import CheckpointError
from megalemur.config.strict_json import canonical_json, parse_json


class Peers:
    """The ranks that work on one checkpoint together; without a group, this process alone."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    def all_gather(self, value: Any) -> list[Any]:
        """A JSON value of every rank, in the order of ranks. Two collectives: the lengths, then padded bytes."""
        data = canonical_json(value)
        if self.group is None:
            return [parse_json(data)]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self.group)
        longest = int(max(lengths))
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        return [parse_json(t[: int(n)].numpy().tobytes()) for t, n in zip(found, lengths, strict=True)]

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        """Send a contiguous CPU tensor; the dtype does not matter, bytes travel."""
        dist.send(_bytes_of(tensor), group=self.group, group_dst=rank)

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        """Fill a contiguous CPU tensor with what `rank` sends."""
        dist.recv(_bytes_of(tensor), group=self.group, group_src=rank)

    def raise_together(self, error: Exception | None, doing: str) -> None:
        """Raise on all ranks when one has failed, with the failing ranks' messages.

        Raises:
            CheckpointError: on every rank alike.
        """
        ranks_of: dict[str, list[int]] = {}
        for rank, text in enumerate(self.all_gather(_describe(error))):
            if text:
                ranks_of.setdefault(text, []).append(rank)
        if isinstance(error, CheckpointError) and len(ranks_of) == 1:
            raise error
        if ranks_of:
            # 512 equal lines would hide the one that differs
            said = "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in ranks_of.items())
            raise CheckpointError(f"{doing} failed: {said}") from error


class Attempt:
    """Work that goes on after an error, because other ranks wait for this one's messages. Keeps the first error."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run the body; an error is kept, not raised."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error


def _describe(error: Exception | None) -> str:
    if error is None:
        return ""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
