"""Process groups, and where in the layout this process stands."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megalemur.config.parallel import ParallelConfig
from megalemur.parallel.device import collective_backend, device_of, has_gpu, open_seam

_SAVER_SECONDS = 3600.0
"""How long one rank of a save may wait for another's disk."""


@dataclass(frozen=True)
class Place:
    """Coordinates of this process and the groups that are not megatron-core's."""

    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    device: torch.device
    cpu_group: dist.ProcessGroup
    """All ranks, for CPU tensors: small agreements, and the traffic of a load."""
    saver_group: dist.ProcessGroup
    """All ranks, for CPU tensors, once more: a save in the background must not meet the agreements of the steps."""

    @property
    def label(self) -> str:
        """Coordinates as the log prints them."""
        return f"tp{self.tp_rank} pp{self.pp_rank} dp{self.dp_rank}"

    @property
    def is_first_stage(self) -> bool:
        """On the first pipeline stage."""
        return parallel_state.is_pipeline_first_stage(ignore_virtual=True)

    @property
    def is_last_stage(self) -> bool:
        """On the last pipeline stage, where losses are."""
        return parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    @property
    def dp_cp_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same parameters."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Ranks that see different samples."""
        return parallel_state.get_data_parallel_group()

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks that split the same layers; norms are whole on each."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def embedding_group(self) -> dist.ProcessGroup | None:
        """First and last stage of this pipeline, which share a tied embedding; None on the stages between."""
        return parallel_state.get_embedding_group() if parallel_state.is_rank_in_embedding_group() else None

    @property
    def pp_group(self) -> dist.ProcessGroup:
        """The stages of this pipeline."""
        return parallel_state.get_pipeline_model_parallel_group()

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this pipeline's last stage."""
        return parallel_state.get_pipeline_model_parallel_last_rank()


def world_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun or the batch script set them; (0, 1, 0) for a lone process."""
    get = os.environ.get
    return int(get("RANK", "0")), int(get("WORLD_SIZE", "1")), int(get("LOCAL_RANK", "0"))


def check_world(parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a world that the layout does not describe, before any group exists.

    Raises:
        ValueError: with the settings that would fit.
    """
    if world_size == parallel.world_size:
        return
    model = parallel.tensor * parallel.pipeline * parallel.context
    fits = world_size % model == 0
    advice = f"set parallel.data={world_size // model}" if fits else f"start a multiple of {model} processes"
    raise ValueError(
        f"{world_size} processes were started, but parallel.tensor={parallel.tensor} x parallel.pipeline="
        f"{parallel.pipeline} x parallel.context={parallel.context} x parallel.data={parallel.data} needs "
        f"{parallel.world_size}; {advice}"
    )


def join(parallel: ParallelConfig, *, timeout_seconds: float) -> Place:
    """Open the seam, join the process group and build megatron-core's groups.

    Args:
        parallel: the layout; its world size must be the number of processes.
        timeout_seconds: limit of every collective.

    Raises:
        ValueError: another number of processes was started.
    """
    _, world_size, local_rank = world_from_environment()
    check_world(parallel, world_size)
    open_seam()
    device = device_of(local_rank)
    if has_gpu():
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world_size == 1 else {}
        dist.init_process_group(collective_backend(), timeout=timeout, **alone)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.chunks if parallel.chunks > 1 else None,
            context_parallel_size=parallel.context,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=max(1, round(timeout_seconds / 60)),
        )
    cpu_group = dist.new_group(backend="gloo", timeout=timeout) if has_gpu() else dist.group.WORLD
    assert cpu_group is not None
    # a slow file system is no hang: while a save waits for it, the steps go on and have their own limit
    saver_timeout = timedelta(seconds=max(timeout_seconds, _SAVER_SECONDS))
    return place_of(device, cpu_group, dist.new_group(backend="gloo", timeout=saver_timeout))


def place_of(device: torch.device, cpu_group: dist.ProcessGroup, saver_group: dist.ProcessGroup) -> Place:
    """The Place of this process in groups that exist already."""
    return Place(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=tensor_rank(),
        pp_rank=pipeline_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        device=device,
        cpu_group=cpu_group,
        saver_group=saver_group,
    )


def tensor_rank() -> int:
    """Which part of every split layer this process holds."""
    return parallel_state.get_tensor_model_parallel_rank()


def pipeline_rank() -> int:
    """Pipeline stage of this process."""
    return parallel_state.get_pipeline_model_parallel_rank()


def holds_first_layer(vp_stage: int | None) -> bool:
    """Whether a chunk of this process is the one that begins with the embedding.

    Args:
        vp_stage: number of the chunk on its stage; None without chunks.
    """
    return parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)


def holds_last_layer(vp_stage: int | None) -> bool:
    """Whether a chunk of this process is the one that ends with the output layer.

    Args:
        vp_stage: number of the chunk on its stage; None without chunks.
    """
    return parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)


def leave() -> None:
    """Destroy all groups."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
