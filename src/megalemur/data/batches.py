"""Batches: which samples a rank's micro-batch is made of, and their tokens, labels, masks and document borders.

A pure function of the sample numbers: every tensor- and pipeline-parallel rank builds the same batch by itself, from
memory-mapped files, and nothing is sent. Legend: b micro-batch, s sequence, d data-parallel size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from megalemur.data.windows import Sample

DocumentMask = Literal["none", "intra"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the CPU."""

    tokens: torch.Tensor
    """[b, s] int64: what the model reads."""
    labels: torch.Tensor
    """[b, s] int64: the token after each."""
    loss_mask: torch.Tensor
    """[b, s] float32: 1 where the label counts."""
    position_ids: torch.Tensor
    """[b, s] int64: positions for the rotary embedding."""
    cu_seqlens: torch.Tensor
    """[borders] int32: 0, then where each document of the b * s flattened tokens ends; a sample always ends one."""
    max_document_length: int
    """Longest stretch between two borders, in tokens."""


class Portion(NamedTuple):
    """A replica's part of every global batch."""

    dp_rank: int
    dp_size: int
    micro_batch_size: int
    """b, in samples."""
    global_batch_size: int
    """Samples a step over all replicas; a multiple of b * d."""

    def sample_numbers(self, first_sample: int) -> list[list[int]]:
        """Sample numbers of each micro-batch of a step, [micro-batches][b].

        Row j of micro-batch m is sample first + m * (b * d) + dp_rank * b + j: the set of all replicas is the range
        [first, first + global_batch_size), whatever b and d are.

        Args:
            first_sample: samples drawn before this step (step * global_batch_size while that size never changed).
        """
        b, stride = self.micro_batch_size, self.micro_batch_size * self.dp_size
        assert self.global_batch_size % stride == 0 and 0 <= self.dp_rank < self.dp_size
        starts = range(first_sample, first_sample + self.global_batch_size, stride)
        return [list(range(at + self.dp_rank * b, at + (self.dp_rank + 1) * b)) for at in starts]


def make_batch(samples: Sequence[Sample], document_mask: DocumentMask, counted: Sequence[bool] | None = None) -> Batch:
    """A micro-batch of b samples of s + 1 tokens.

    Args:
        samples: b samples.
        document_mask: none: one document a sample, every label counts. intra: borders inside the samples are borders,
            positions start again at each, and the label that is the first token of another document does not count:
            the last token of a document (its end-of-document token, where it has one) predicts nothing.
        counted: for each sample whether any of its labels count; None: all do.
    """
    window = np.stack([sample.tokens for sample in samples])
    b, s = window.shape[0], window.shape[1] - 1
    loss_mask = np.ones((b, s), np.float32)
    positions = np.tile(np.arange(s, dtype=np.int64), (b, 1))
    ends = [np.zeros(1, np.int64)]
    for row, sample in enumerate(samples):
        if document_mask == "intra":
            # the token at a border is the label of the position before it; a border at s is the last label
            loss_mask[row, sample.borders - 1] = 0
            inside = sample.borders[sample.borders < s]
            starts = np.concatenate([[0], inside])
            positions[row] -= np.repeat(starts, np.diff(starts, append=s))
            ends.append(row * s + inside)
        ends.append(np.array([(row + 1) * s]))
        if counted is not None and not counted[row]:
            loss_mask[row] = 0
    borders = np.concatenate(ends)
    return Batch(
        tokens=torch.from_numpy(window[:, :-1].copy()),
        labels=torch.from_numpy(window[:, 1:].copy()),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        max_document_length=int(np.diff(borders).max()),
    )
