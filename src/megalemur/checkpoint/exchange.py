"""What the ranks of a save or load tell each other, over a CPU process group: JSON bytes and tensors.

No `*_object` collective: those unpickle what arrives.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalemur.checkpoint.errors import CheckpointError, DamagedCheckpoint, UnreadableCheckpoint
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

    def begin_send(self, data: torch.Tensor, rank: int) -> dist.Work:
        """Send bytes; wait for the result before `data` is changed."""
        work = dist.isend(data, group=self.group, group_dst=rank)
        assert work is not None
        return work

    def begin_receive(self, data: torch.Tensor, rank: int) -> dist.Work:
        """Fill `data` with the bytes that `rank` sends, once the result is waited for."""
        work = dist.irecv(data, group=self.group, group_src=rank)
        assert work is not None
        return work

    def share(self, data: bytes) -> bytes:
        """Rank 0's bytes, on all ranks; what the others give is not looked at. Two collectives."""
        if self.group is None:
            return data
        length = self.all_gather(len(data))[0]
        shared = torch.empty(length, dtype=torch.uint8)
        if self.rank == 0 and data:
            shared = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(shared, group=self.group, group_src=0)
        return shared.numpy().tobytes()

    def raise_together(self, error: Exception | None, doing: str) -> None:
        """Raise on all ranks when one has failed, with the failing ranks' messages.

        Raises:
            DamagedCheckpoint: on every rank alike, when damage is all that any rank found; names the first place.
            CheckpointError: on every rank alike.
        """
        said = self.all_gather(_describe(error))
        ranks_of: dict[str, list[int]] = {}
        for rank, report in enumerate(said):
            if report is not None:
                ranks_of.setdefault(report["text"], []).append(rank)
        failed = [report for report in said if report is not None]
        if failed and all(report["damage"] for report in failed):
            raise _damage_of([report["damage"] for report in failed]) from error
        if isinstance(error, CheckpointError) and len(ranks_of) == 1:
            raise error
        if ranks_of:
            # 512 equal lines would hide the one that differs
            told = "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in ranks_of.items())
            raise CheckpointError(f"{doing} failed: {told}") from error


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


def _describe(error: Exception | None) -> dict[str, Any] | None:
    if error is None:
        return None
    text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    damage = None
    if isinstance(error, DamagedCheckpoint):
        damage = [str(error.path), error.reason, isinstance(error, UnreadableCheckpoint)]
    return {"text": text, "damage": damage}


def _damage_of(found: list[list[Any]]) -> DamagedCheckpoint:
    """The first place that was named, as an error; bytes that differ count before files that cannot be read."""
    places = sorted({(bool(unreadable), path, reason) for path, reason, unreadable in found})
    unreadable, path, reason = places[0]
    more = f" (and {len(places) - 1} more places)" if len(places) > 1 else ""
    return (UnreadableCheckpoint if unreadable else DamagedCheckpoint)(Path(path), reason + more)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
