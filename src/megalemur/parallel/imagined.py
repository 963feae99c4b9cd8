"""One rank of a layout without the others: torch's fake process group, whose collectives end at once and move nothing.

For the planner's dry run, whose tensors have shapes and no values (torch's fake tensors). What megatron-core reads out
of values is answered here, as every other rank would answer it.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import megatron.core.tensor_parallel.random as mcore_random
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch._C._distributed_c10d import FakeWork
from torch.testing._internal.distributed.fake_pg import FakeStore

from megalemur.config.parallel import ParallelConfig
from megalemur.parallel.device import open_seam
from megalemur.parallel.groups import leave
from megalemur.parallel.seeds import seed_step


@functools.cache
def _shapes_of_collectives() -> torch.library.Library:
    """Answers for the collectives that torch itself cannot run on tensors without values: those sent as one."""
    library = torch.library.Library("c10d", "IMPL", "Meta")
    for name in ("allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_", "allreduce_coalesced_"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"c10d::{name}", "Meta"):
            library.impl(name, lambda *_, **__: FakeWork().boxed())
    return library


def _alike(answers: list[Any], mine: Any, group: Any = None) -> None:
    """Every rank says what this one says."""
    answers[:] = [mine] * len(answers)


def _nothing(*_: Any, **__: Any) -> tuple[()]:
    return ()


@contextlib.contextmanager
def imagined_rank(parallel: ParallelConfig, rank: int) -> Iterator[dict[str, str]]:
    """Inside, this process is `rank` of the layout's world; no other process exists. On the CPU only.

    Yields torch's name of each process group to the setting that makes it.

    Args:
        parallel: the layout, of any number of processes.
        rank: global rank.
    """
    open_seam()
    _shapes_of_collectives()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.chunks if parallel.chunks > 1 else None,
            context_parallel_size=parallel.context,
            create_gloo_process_groups=False,
        )
        seed_step(0, 0, 0, 0)
        with _without_values():
            yield _names()
    finally:
        leave()
        parallel_state._EMBEDDING_GLOBAL_RANKS = None  # left standing, and the next rank is another


def _names() -> dict[str, str]:
    groups = {
        "data x context": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "data": parallel_state.get_data_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "tensor": parallel_state.get_tensor_model_parallel_group(),
    }
    if parallel_state.get_embedding_group(check_initialized=False) is not None:
        groups["embedding"] = parallel_state.get_embedding_group()
    return {group.group_name: name for name, group in groups.items()}


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    tracker = mcore_random.CudaRNGStatesTracker
    with (
        mock.patch.object(torch.distributed, "all_gather_object", _alike),
        # generator states are compared and set by value
        mock.patch.object(tracker, "fork", lambda *_, **__: contextlib.nullcontext()),
        mock.patch.object(mcore_random, "_get_all_rng_states", _nothing),
        mock.patch.object(mcore_random, "_set_all_rng_states", _nothing),
    ):
        yield
