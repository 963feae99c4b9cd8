"""Gradients over the replicas: megatron-core's DDP around each model chunk, and the hooks its schedules call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from megalemur.config.parallel import ParallelConfig
from megalemur.config.precision import PrecisionConfig


def wrap_chunks(
    chunks: Sequence[torch.nn.Module],
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    backward_done: Callable[[], None] = lambda: None,
) -> list[DistributedDataParallel]:
    """Put each chunk into megatron-core's DDP: contiguous gradient buffers, reduced in buckets.

    Args:
        chunks: this rank's model chunks; they share one megatron-core config, which receives the hooks.
        parallel: layout and overlaps.
        precision: width of the gradients.
        backward_done: called once a step, after this rank's last backward pass and before it waits for its replicas.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=precision.reduce_grads_in_fp32,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.bucket_parameters or None,
        average_in_collective=False,
    )
    wrapped = []
    for number, chunk in enumerate(chunks):
        # only the first chunk's reduction has nothing to overlap with: the others still compute behind it
        wrapped.append(DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=number > 0))
    _install_hooks(wrapped, parallel, backward_done)
    return wrapped


def _install_hooks(
    wrapped: Sequence[DistributedDataParallel], parallel: ParallelConfig, backward_done: Callable[[], None]
) -> None:
    def finalize(*args: Any, **kwargs: Any) -> None:
        backward_done()
        finalize_model_grads(*args, **kwargs)

    config = wrapped[0].config
    config.finalize_model_grads_func = finalize
    if parallel.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = syncs if len(wrapped) > 1 else syncs[0]


def zero_gradients(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Zero the gradient buffers before a step."""
    for chunk in wrapped:
        chunk.zero_grad_buffer()


def gather_parameters(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Wait until every rank's parameters are whole, also those whose gathering was left to the next forward pass."""
    for chunk in wrapped:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
