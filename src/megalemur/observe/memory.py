"""What the CUDA allocator held: figures for the records, and a snapshot at the moment when memory ran out."""

import logging
from pathlib import Path

import torch

from megalemur.observe.observer import StepReport

_log = logging.getLogger(__name__)

_EVENTS = 100_000
"""Allocations and frees that are remembered; about 100 MB of host memory with their stacks."""


def cuda_memory() -> dict[str, int]:
    """Peaks of this process' device since the start, and how often its cache had to be freed; empty on CPU."""
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "allocation_retries": int(torch.cuda.memory_stats().get("num_alloc_retries", 0)),
    }


class MemorySnapshot:
    """Remembers allocations and writes them when the allocator gives up. CUDA only.

    The file is for https://pytorch.org/memory_viz, in torch's own form; nothing of ours ever reads it.
    """

    def __init__(self, path: Path):
        """Begin to remember; costs some microseconds an allocation.

        Args:
            path: of the snapshot.
        """
        self._path, self._written = path, False
        torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
        # called by the allocator before the error is raised, when everything is still held
        torch._C._cuda_attach_out_of_memory_observer(self._out_of_memory)  # type: ignore[attr-defined]

    def _out_of_memory(self, device: int, wanted: int, total: int, free: int) -> None:
        """Write the first time only: a caller may catch the error and try again."""
        if self._written:
            return
        self._written = True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._path))
        except (OSError, RuntimeError) as error:
            _log.warning("out of memory, and no snapshot at %s: %s", self._path, error)
            return
        _log.warning("out of memory on device %d (%d bytes wanted): snapshot at %s", device, wanted, self._path)

    def after_step(self, report: StepReport) -> None:
        """The allocator calls by itself."""

    def at_save(self, step: int, path: Path, seconds: float) -> None:
        """The allocator calls by itself."""

    def at_end(self) -> None:
        """Stop remembering."""
        torch.cuda.memory._record_memory_history(enabled=None)
