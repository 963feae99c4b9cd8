"""Micro-batches: a hand-made example of masks, positions and borders; who takes which sample."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalemur.data.batches import Portion, make_batch
from megalemur.data.windows import Sample

# s = 6. First row: documents end after "11 12 2" and "21 2"; 31 is the first token of a third, inside as input.
# Second row: one document of the whole input, whose last label, 51, is the first token of the next document.
FIRST = Sample(np.array([11, 12, 2, 21, 2, 31, 32]), np.array([3, 5]))
SECOND = Sample(np.array([41, 42, 43, 44, 45, 2, 51]), np.array([6]))


def test_borders_inside_documents_by_hand():
    batch = make_batch([FIRST, SECOND], "intra")
    assert batch.tokens.tolist() == [[11, 12, 2, 21, 2, 31], [41, 42, 43, 44, 45, 2]]
    assert batch.labels.tolist() == [[12, 2, 21, 2, 31, 32], [42, 43, 44, 45, 2, 51]]
    # a document's last token, its EOS, does not predict the next document; EOS itself is predicted
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6, 12]
    assert batch.max_document_length == 6


def test_without_a_document_mask_only_samples_are_borders_and_every_label_counts():
    batch = make_batch([FIRST, SECOND], "none")
    assert batch.loss_mask.tolist() == [[1] * 6] * 2
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert batch.cu_seqlens.tolist() == [0, 6, 12] and batch.max_document_length == 6


def test_types_are_what_the_model_takes():
    batch = make_batch([FIRST], "intra")
    kinds = [getattr(batch, name).dtype for name in ("tokens", "labels", "position_ids", "loss_mask", "cu_seqlens")]
    assert kinds == [torch.int64, torch.int64, torch.int64, torch.float32, torch.int32]
    assert all(getattr(batch, name).is_contiguous() for name in ("tokens", "labels", "position_ids", "loss_mask"))


@pytest.mark.parametrize("document_mask", ["none", "intra"])
def test_samples_that_do_not_count_are_masked_and_nothing_else(document_mask):
    both, one = (make_batch([FIRST, SECOND], document_mask, counted) for counted in (None, [True, False]))
    assert one.loss_mask[0].equal(both.loss_mask[0]) and one.loss_mask[1].sum() == 0
    assert one.tokens.equal(both.tokens) and one.cu_seqlens.equal(both.cu_seqlens)


@given(borders=st.sets(st.integers(1, 9)), rows=st.integers(1, 3))
def test_positions_and_borders_tell_the_same(borders, rows):
    sample = Sample(np.arange(10), np.array(sorted(borders), np.int64))
    batch = make_batch([sample] * rows, "intra")
    zeros = (batch.position_ids.reshape(-1) == 0).nonzero().reshape(-1)
    assert batch.cu_seqlens.tolist() == [*zeros.tolist(), 9 * rows]
    steps = batch.position_ids.diff(dim=1)
    assert ((steps == 1) | (batch.position_ids[:, 1:] == 0)).all()
    assert (batch.loss_mask == 0).sum() == rows * len(borders)


@pytest.mark.parametrize("dp_size, micro", [(1, 1), (1, 24), (2, 3), (4, 2), (8, 3), (24, 1)])
def test_a_step_is_the_same_set_of_samples_in_every_layout(dp_size, micro):
    taken = [Portion(rank, dp_size, micro, 24).sample_numbers(48) for rank in range(dp_size)]
    assert all(len(rows) == micro for replica in taken for rows in replica)
    assert len({len(replica) for replica in taken}) == 1
    assert sorted(n for replica in taken for rows in replica for n in rows) == list(range(48, 72))


def test_row_j_of_micro_batch_m_is_as_documented():
    assert Portion(1, 2, 3, 12).sample_numbers(12) == [[15, 16, 17], [21, 22, 23]]
