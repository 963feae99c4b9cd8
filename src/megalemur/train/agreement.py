"""What all ranks must know before a step that one of them alone cannot know: a signal, its deadline, a batch that
cannot be read, a background save that was one failure too many.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from megalemur.checkpoint.errors import CheckpointError
from megalemur.data.batches import Batch
from megalemur.data.errors import DataError
from megalemur.parallel.groups import Place
from megalemur.supervise.signals import StopRequest


class Drawn(NamedTuple):
    """The batches of a step, or why there are none."""

    batches: list[Batch]
    error: Exception | None = None


def draw(read: Callable[[], list[Batch]]) -> Drawn:
    """Read a step's batches; an error is kept until all ranks know of it."""
    try:
        return Drawn(read())
    except Exception as error:  # whatever it is, the other ranks would wait for this one in a collective
        return Drawn([], error)


def agree(place: Place, stop: StopRequest, drawn: Drawn, *, saves_exhausted: bool = False) -> bool:
    """Whether any rank was asked to stop. A collective of three bytes, over the host.

    Args:
        place: of this rank.
        stop: what it was asked.
        drawn: its batches.
        saves_exhausted: too many saves in a row have failed; every rank's have, but some may know it a step later.

    Raises:
        DataError or what `drawn` holds: on every rank, when one of them could not read its batches.
        CheckpointError: on every rank, when one of them knows that too many saves have failed.
    """
    flags = torch.tensor([stop.heard, drawn.error is not None, saves_exhausted], dtype=torch.uint8)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=place.cpu_group)
    if drawn.error is not None:
        raise drawn.error
    if flags[1]:
        raise DataError("another rank could not read its batches; its log says which file and why")
    if flags[2]:
        raise CheckpointError(
            "the last saves in a row have all failed (checkpoint.max_failed_saves); the log says how. Mend the file "
            "system and start again: the run goes on from its newest checkpoint"
        )
    return bool(flags[0])
