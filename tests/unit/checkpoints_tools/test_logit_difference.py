"""Differences and KL divergences, taken in blocks of the vocabulary, are those of whole logits."""

import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from checkpoints_tools import forward, mover
from checkpoints_tools.errors import RequestError
from checkpoints_tools.logit_difference import LogitDifferences, compare_logits
from tests.support.weights import MISTAKES, MemoryWeights, mistaken, random_tensors, tiny_model

PROMPTS = [[1, 17, 250, 3, 3, 9], [(7 * k * k + 3) % 251 for k in range(100)]]
MODEL = tiny_model()


def in_blocks(a, b, *cuts):
    found = LogitDifferences(len(a))
    for first, last in zip((0, *cuts), (*cuts, a.shape[1]), strict=True):
        found.add(a[:, first:last], b[:, first:last])
    return found.result()


@pytest.mark.parametrize("cuts", [(), (1,), (3, 50, 51)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 1.0, 300.0])
def test_they_are_those_of_whole_logits(cuts, scale):
    generator = torch.Generator().manual_seed(3)
    a, b = (scale * torch.randn(40, 97, generator=generator) + 1000 for _ in range(2))
    found = in_blocks(a, b, *cuts)
    p, q = (log_softmax(x.double(), dim=1) for x in (a, b))
    kl = kl_div(q, p, log_target=True, reduction="none").sum(1)
    assert found.max_kl == pytest.approx(kl.max().item(), rel=1e-9)
    assert found.mean_kl == pytest.approx(kl.mean().item(), rel=1e-9)
    gap = (a.double() - b.double()).abs()
    assert (found.max_difference, found.tokens, found.vocabulary) == (gap.max().item(), 40, 97)
    assert found.mean_difference == pytest.approx(gap.mean().item()) and found.largest_logit == a.max().item()
    assert found.same_choice == int((a.argmax(1) == b.argmax(1)).sum())


def test_equal_logits_are_at_no_distance():
    a = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    found = in_blocks(a, a, 11)
    assert (found.max_difference, found.mean_difference, found.max_kl, found.same_choice) == (0, 0, 0, 5)
    assert found.within(0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_within_no_bound(bad):
    a = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    b = a.clone()
    b[2, 3] = bad
    for one, other in ((a, b), (b, a)):
        assert not in_blocks(one, other, 11).within(1e30, math.inf)
        assert not in_blocks(one, other, 11).within(math.inf, 1e30) or bad == -math.inf


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_converters_are_far_beyond_what_rounding_does(mistake, monkeypatch):
    monkeypatch.setattr(mover, "BLOCK_BYTES", 4000)
    tensors = random_tensors(MODEL)
    right, rounded = (MemoryWeights(MODEL, random_tensors(MODEL, dtype=d)) for d in (torch.float32, torch.bfloat16))
    wrong = MemoryWeights(MODEL, mistaken(mistake, MODEL, tensors))
    noise, found = compare_logits(right, rounded, PROMPTS), compare_logits(right, wrong, PROMPTS)
    assert 0 < noise.max_kl < 1e-2 and noise.max_difference < 0.2
    assert found.max_difference > 5 * noise.max_difference and found.max_kl > 10 * noise.max_kl
    assert compare_logits(right, right, PROMPTS).within(0, 0) and not found.within(0.2, 1e-2)


def test_models_of_two_vocabularies_are_compared_over_what_both_know():
    larger = tiny_model(vocab_size=300)
    tensors = random_tensors(MODEL)
    more = {name: torch.cat([t, torch.randn(49, 64)]) if len(t) == 251 else t for name, t in tensors.items()}
    a, b = MemoryWeights(MODEL, tensors), MemoryWeights(larger, more)
    found = compare_logits(a, b, PROMPTS)
    assert found.vocabulary == 251 and found.within(1e-5, 1e-9)
    with pytest.raises(RequestError, match="the id 260"):
        compare_logits(b, a, [[260]])


def test_models_of_two_widths_are_compared(monkeypatch):
    monkeypatch.setattr(mover, "BLOCK_BYTES", 4000)
    small, read = tiny_model(hidden_size=32, num_attention_heads=4, num_layers=1), []
    a, b = (MemoryWeights(model, random_tensors(model)) for model in (MODEL, small))
    found = compare_logits(a, b, PROMPTS, read.append)
    whole = in_blocks(*(forward.logits(weights, PROMPTS) for weights in (a, b)))
    assert found.max_kl == pytest.approx(whole.max_kl, rel=1e-4) and found.max_kl > 0.1
    assert sum(read) == forward.bytes_to_read(a) + forward.bytes_to_read(b)
