"""A rank's share of the state in host memory, as its step left it: what a background save writes.

Allocated once and used at every save; pinned where the state lives on a GPU, so that the copy runs at the bus' speed.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from megalemur.checkpoint.manifest import ITEM_BYTES
from megalemur.checkpoint.placement import Claim, Placed


def copy_bytes(parts: Sequence[Placed]) -> int:
    """Host memory that the copy of these parts takes."""
    return sum(part.box.size for part in parts) * ITEM_BYTES


class HostCopy:
    """Room for the parts that this rank writes, one behind the other."""

    def __init__(self, parts: Sequence[Placed], *, pinned: bool):
        """Allocate, and touch every page: the first save must not pay for it.

        Args:
            parts: what this rank writes.
            pinned: the state is on a GPU.
        """
        self.parts = list(parts)
        room = torch.empty(copy_bytes(parts) // ITEM_BYTES, dtype=torch.float32, pin_memory=pinned)
        room.zero_()
        self._views: dict[Placed, torch.Tensor] = {}
        first = 0
        for part in parts:
            self._views[part] = room[first : first + part.box.size].view(part.box.shape)
            first += part.box.size

    def take(self, held: Mapping[Claim, torch.Tensor]) -> None:
        """Copy the values as they are now. On a GPU, waits for the step's work and for the copy."""
        pairs = [(room, held[part.claim][part.box.relative_to(part.held).slices]) for part, room in self._views.items()]
        for room, tensor in pairs:
            if tensor.is_cuda:
                room.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for _, tensor in pairs):
            torch.cuda.current_stream().synchronize()
        _copy_on_host([(room, tensor) for room, tensor in pairs if not tensor.is_cuda])

    def read(self, part: Placed) -> torch.Tensor:
        """What was taken of a part."""
        return self._views[part]


def _copy_on_host(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """(to, from) pairs of CPU tensors, by as many threads as torch computes with.

    Not torch's own threads: those wait for each other after every tensor, spinning, and where something else runs on a
    core a copy takes several times as long (seen on 2 shared cores).
    """
    workers = min(torch.get_num_threads(), len(pairs))
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(_copy_one, pairs))
    else:
        for pair in pairs:
            _copy_one(pair)


def _copy_one(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    room, tensor = pair
    np.copyto(room.numpy(), tensor.numpy())  # lets go of the interpreter's lock
