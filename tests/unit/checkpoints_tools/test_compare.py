"""Nothing that differs between two checkpoints escapes the comparison, and nothing that is equal is reported."""

import math

import pytest
import torch
import xxhash

from checkpoints_tools import mover
from checkpoints_tools.compare import compare
from checkpoints_tools.regions import WEIGHT, Key
from megalemur.model.names import EMBEDDING, HEAD, NORM
from tests.support.weights import MISTAKES, MemoryWeights, mistaken, random_tensors, tiny_model

MODEL = tiny_model()
Q = "model.layers.1.self_attn.q_proj.weight"


def weights(dtype=torch.float32, change=None, **kinds):
    tensors = random_tensors(MODEL, dtype=dtype)
    if change is not None:
        change(tensors)
    return MemoryWeights(MODEL, tensors, **kinds)


def compared(a, b):
    return compare(a, b, workers=2)


def only(comparison, tolerance=0.0):
    (found,) = comparison.beyond(tolerance)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [1, 1000, 1 << 24])
def test_equal_checkpoints_are_equal_whatever_the_blocks_are(dtype, block, monkeypatch):
    monkeypatch.setattr(mover, "BLOCK_BYTES", block)
    read = []
    found = compare(weights(dtype), weights(dtype), workers=3, progress=read.append)
    assert found.equal() and not found.cast and [one.key for one in found.tensors] == list(weights().dtypes)
    assert sum(read) == sum(tensor.nbytes for tensor in random_tensors(MODEL, dtype=dtype).values())
    whole = random_tensors(MODEL, dtype=dtype)[Q].view(torch.uint8).numpy().tobytes()
    digests = next(one.digests for one in found.tensors if one.key.name == Q)
    assert digests == (xxhash.xxh3_128_hexdigest(whole),) * 2


@pytest.mark.parametrize("block", [1000, 1 << 24])
def test_a_single_bit_is_found_counted_and_measured(block, monkeypatch):
    monkeypatch.setattr(mover, "BLOCK_BYTES", block)

    def change(tensors):
        tensors[Q].view(torch.int32)[63, 63] ^= 1

    found = compared(weights(), weights(change=change))
    one = only(found)
    assert (one.key, one.differing) == (Key(WEIGHT, Q), 1) and one.digests[0] != one.digests[1]
    assert 0 < one.max_difference < 1e-6 and one.rms_difference == pytest.approx(one.max_difference / 64)
    assert found.equal(tolerance=1e-6) and not found.equal(tolerance=one.max_difference / 2)


def test_numbers_are_those_of_the_whole_tensors():
    a, b = (random_tensors(MODEL, seed=seed)[Q].double() for seed in (0, 1))
    one = only(compared(weights(), weights(change=lambda tensors: tensors.update({Q: b.float()}))))
    assert one.differing == int((a != b).sum()) and one.max_difference == (a - b).abs().max().item()
    assert one.rms_difference == pytest.approx((a - b).square().mean().sqrt().item())


def test_minus_zero_is_no_zero_until_values_are_asked_for():
    def change(tensors):
        tensors[NORM][3] = 0.0

    def minus(tensors):
        tensors[NORM][3] = -0.0

    found = compared(weights(change=change), weights(change=minus))
    assert (only(found).differing, only(found).max_difference) == (1, 0.0) and found.equal(tolerance=1e-30)


def test_the_same_nan_is_equal_and_another_is_beyond_every_tolerance():
    def change(tensors):
        tensors[Q][0, :2] = math.nan

    def worse(tensors):
        change(tensors)
        tensors[Q][1, 0] = math.nan
        tensors[Q][2, 0] += 1

    assert compared(weights(change=change), weights(change=change)).equal()
    found = compared(weights(change=change), weights(change=worse))
    assert (only(found, 1e30).differing, only(found).max_difference) == (2, math.inf)
    assert not found.equal(tolerance=1e300)


def test_a_cast_that_rounded_right_is_equal_in_both_directions():
    def rounded_down(tensors):
        tensors[Q].view(torch.int16)[5, 5] ^= 1

    wide, narrow, wrong = weights(), weights(torch.bfloat16), weights(torch.bfloat16, rounded_down)
    for a, b in ((wide, narrow), (narrow, wide)):
        found = compared(a, b)
        assert found.equal() and len(found.cast) == len(found.tensors)
        assert {one.compared_as for one in found.tensors} == {torch.bfloat16}
        assert all(one.digests[0] != one.digests[1] for one in found.tensors)
    assert only(compared(wide, wrong)).differing == 1
    assert {one.compared_as for one in compared(narrow, weights(torch.float16)).tensors} == {torch.float16}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mistakes_of_converters_are_found(mistake, dtype):
    tensors = random_tensors(MODEL, dtype=dtype)
    found = compared(MemoryWeights(MODEL, tensors), MemoryWeights(MODEL, mistaken(mistake, MODEL, tensors)))
    touched = {one.key.name for one in found.beyond(0.1)}
    expected = {
        "interleaved rotary": {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"},
        "swapped gate and up": {"model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"},
        "shifted vocabulary": {EMBEDDING, HEAD},
        "dropped row": {HEAD},
        "transposed KV groups": {"model.layers.0.self_attn.k_proj.weight"},
        "exchanged KV groups": {"model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"},
    }
    assert touched == expected[mistake]


def test_other_settings_are_named_and_run_settings_are_not():
    other = tiny_model(rope_theta=500000.0, norm_eps=1e-6, init_std=0.5, backend="torch")
    found = compared(weights(), MemoryWeights(other, random_tensors(MODEL)))
    assert [(one.name, one.a, one.b) for one in found.settings] == [
        ("rope_theta", 10000.0, 500000.0),
        ("norm_eps", 1e-5, 1e-6),
    ]
    assert not found.beyond(0) and not found.equal(tolerance=math.inf)


def test_other_shapes_and_tensors_that_one_alone_has_are_named():
    other = tiny_model(vocab_size=252, num_layers=3)
    found = compared(weights(), MemoryWeights(other, random_tensors(other)))
    assert {one.name for one in found.settings} == {"vocab_size", "num_layers"}
    assert {one.key.name for one in found.tensors if not one.same_shape} == {EMBEDDING, HEAD}
    assert not found.alone[0] and len(found.alone[1]) == 9 and not found.equal(tolerance=math.inf)
    tied = tiny_model(tie_embeddings=True)
    assert compared(weights(), MemoryWeights(tied, random_tensors(tied))).alone == ([Key(WEIGHT, HEAD)], [])


def test_optimizer_state_is_compared_where_both_have_it_and_named_where_not():
    moments, others = random_tensors(MODEL, seed=5), random_tensors(MODEL, seed=5)
    others[Q][0, 0] += 1
    a, b = weights(exp_avg=moments, exp_avg_sq=moments), weights(exp_avg=others)
    found = compared(a, b)
    assert found.left_out == (["exp_avg_sq"], []) and found.alone == ([], [])
    assert only(found).key == Key("exp_avg", Q)
    assert compared(a, weights()).equal()


def test_the_number_of_threads_changes_nothing(monkeypatch):
    monkeypatch.setattr(mover, "BLOCK_BYTES", 1000)
    a, b = (MemoryWeights(MODEL, random_tensors(MODEL, seed=seed)) for seed in (0, 1))
    assert compare(a, b, workers=1) == compare(a, b, workers=5)


@pytest.mark.parametrize("which", [0, 1])
def test_an_error_of_either_side_ends_the_comparison(which):
    class Damaged(MemoryWeights):
        def read(self, key, first, last):
            if key.name == Q:
                raise OSError("no such sector")
            return super().read(key, first, last)

    pair = [weights(), weights()]
    pair[which] = Damaged(MODEL, random_tensors(MODEL))
    with pytest.raises(OSError, match="no such sector"):
        compare(*pair, workers=2)
