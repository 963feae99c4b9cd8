"""How long each rank's own part of a step took: where a slow replica shows."""

import time

import torch
import torch.distributed as dist

from megalemur.parallel.groups import Place


def peaks_everywhere(place: Place) -> list[int]:
    """Peak of the CUDA allocator on every rank since the start; empty on CPU. A collective over the host."""
    if place.device.type != "cuda":
        return []
    everyone = torch.zeros(place.world_size, dtype=torch.int64)
    everyone[place.rank] = torch.cuda.max_memory_allocated()
    dist.all_reduce(everyone, group=place.cpu_group)
    return everyone.tolist()


class ReadyClock:
    """Seconds from a step's beginning until this rank's gradients were ready, before it waited for other replicas.

    A whole step lasts equally long on all ranks, because each waits for the slowest: only what lies before the
    replicas meet can tell them apart. Ranks of one replica wait for each other inside (tensor parallelism at every
    layer, stages for their neighbours), so a slow rank makes its whole replica late, and stage 0, which ends last.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._begun = self._ready = self._now()

    def begin(self) -> None:
        """A step begins; its batches are not read yet."""
        self._begun = self._ready = self._now()

    def ready(self) -> None:
        """The last backward pass of this rank is under way."""
        self._ready = self._now()

    def seconds(self) -> float:
        """Seconds between the two. On CUDA, the step must have been waited for."""
        if isinstance(self._begun, float):
            return self._ready - self._begun
        return self._begun.elapsed_time(self._ready) / 1e3

    def everywhere(self, place: Place) -> list[float]:
        """`seconds` of every rank. A collective over the host."""
        everyone = torch.zeros(place.world_size, dtype=torch.float64)
        everyone[place.rank] = self.seconds()
        dist.all_reduce(everyone, group=place.cpu_group)
        return everyone.tolist()

    def _now(self):
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # the host runs ahead of the GPU: its own clock would say nothing
        event.record()
        return event
