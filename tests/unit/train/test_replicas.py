"""The digest finds every single flipped bit, and a difference names those that are alone."""

import pytest
import torch

from megalemur.train.replicas import _CHUNK_WORDS, Digester, suspects

WIDTHS = {torch.bfloat16: (torch.int16, 16), torch.float32: (torch.int32, 32)}


@pytest.fixture(scope="module")
def digest():
    return Digester(torch.device("cpu"))


def flipped(tensor, element, bit):
    width, bits = WIDTHS[tensor.dtype]
    copy = tensor.clone()
    copy.view(-1).view(width)[element] ^= (1 << bit) - (1 << bits if bit == bits - 1 else 0)
    return copy


@pytest.mark.parametrize("dtype", WIDTHS)
def test_every_bit_of_every_element_counts(digest, dtype):
    tensor = torch.randn(3, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = int(digest(tensor))
    seen = {
        int(digest(flipped(tensor, element, bit)))
        for element in range(tensor.numel())
        for bit in range(WIDTHS[dtype][1])
    }
    assert len(seen) == tensor.numel() * WIDTHS[dtype][1], "each flip is told from each other"
    assert whole not in seen


@pytest.mark.parametrize("element", [0, _CHUNK_WORDS - 1, _CHUNK_WORDS, 3 * _CHUNK_WORDS + 4])
@pytest.mark.parametrize("bit", [0, 31])
def test_a_flip_counts_in_every_chunk(digest, element, bit):
    tensor = torch.zeros(3 * _CHUNK_WORDS + 5)
    assert int(digest(tensor)) != int(digest(flipped(tensor, element, bit)))


def test_places_count_and_where_a_tensor_lies_does_not(digest):
    values = torch.arange(1, 101, dtype=torch.bfloat16)
    assert int(digest(values)) != int(digest(values.flip(0)))
    for offset in range(4):
        buffer = torch.zeros(120, dtype=torch.bfloat16)
        buffer[offset : offset + 100] = values
        assert int(digest(buffer[offset : offset + 100])) == int(digest(values))


def test_zeros_of_another_sign_and_values_that_are_none_are_told_apart(digest):
    assert int(digest(torch.tensor([0.0]))) != int(digest(torch.tensor([-0.0])))
    nan = torch.tensor([float("nan")])
    assert int(digest(nan)) == int(digest(nan.clone()))


@pytest.mark.parametrize(
    ("digests", "odd"),
    [
        ([7, 7, 8], [2]),
        ([8, 7, 7, 7], [0]),
        ([7, 8], [0, 1]),
        ([7, 7, 8, 8], [0, 1, 2, 3]),
        ([7, 8, 9], [0, 1, 2]),
        ([7, 7, 7, 8, 9], [3, 4]),
    ],
)
def test_those_outside_the_majority_are_named_and_all_where_there_is_none(digests, odd):
    assert suspects(digests) == odd
