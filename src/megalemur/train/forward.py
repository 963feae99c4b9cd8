"""One micro-batch through a model chunk, and the loss behind it: what megatron-core's schedules call.

Shapes: b micro-batch, s sequence, t = b * s tokens of a packed micro-batch.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megalemur.data.batches import Batch

LossReport = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def sum_of_losses(loss_mask: torch.Tensor, losses: torch.Tensor) -> LossReport:
    """(sum of losses, number of tokens, report): megatron-core divides by the tokens of all ranks and micro-batches.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        losses: cross entropy a token, the mask's number of elements.
    """
    mask = loss_mask.reshape(-1)
    # where, not times: a masked token with an infinite loss would make the sum NaN
    total = torch.where(mask > 0, losses.reshape(-1).float() * mask, 0.0).sum()
    tokens = mask.sum()
    report = {"sums": torch.stack([total.detach(), tokens]).double()}
    return total, tokens.to(torch.int), report


def packing(batch: Batch, device: torch.device) -> PackedSeqParams:
    """Document borders of a packed micro-batch, as attention and rotary embedding read them."""
    borders = batch.cu_seqlens.to(device)
    longest = batch.max_document_length
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


class ForwardStep:
    """megatron-core's forward_step_func: takes the next micro-batch and runs one chunk on it."""

    def __init__(self, device: torch.device, *, packed: bool, borders_device: torch.device):
        """Set up.

        Args:
            device: where the model is.
            packed: micro-batches go through as one sequence of t tokens with their document borders.
            borders_device: where the attention kernel wants the borders: its own device, or the CPU for ours.
        """
        self._device, self._packed, self._borders_device = device, packed, borders_device

    def __call__(
        self, batches: Iterator[Batch], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], LossReport]]:
        """Output of the chunk (losses [b, s] on the last stage) and the function that makes a loss of it."""
        batch = next(batches)
        # every stage gets the batch: the middle ones need its document borders
        tokens, labels, positions, mask = (
            x.to(self._device, non_blocking=True)
            for x in (batch.tokens, batch.labels, batch.position_ids, batch.loss_mask)
        )
        extra: dict[str, Any] = {}
        if self._packed:
            tokens, labels, positions = (x.reshape(1, -1) for x in (tokens, labels, positions))
            extra["packed_seq_params"] = packing(batch, self._borders_device)
        # no attention mask: the kernels are causal by themselves
        return model(tokens, positions, None, labels=labels, **extra), partial(sum_of_losses, mask)
