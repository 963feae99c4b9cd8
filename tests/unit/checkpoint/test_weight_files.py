"""How weights are cut into files, and that every rank takes an even share of the bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalemur.checkpoint.hf_files import SMALL_FILE_BYTES, WeightFile, share_out
from megalemur.checkpoint.tensor_file import TensorSpec
from megalemur.config.model import ModelConfig
from megalemur.model.names import hf_shapes


def specs_of(sizes: list[int]) -> dict[str, TensorSpec]:
    return {f"t{i:03d}": TensorSpec((size,), torch.bfloat16) for i, size in enumerate(sizes)}


def written(files: list[WeightFile], loads: list[int]) -> list[int]:
    """Bytes that each rank writes in all."""
    total = list(loads)
    for file in files:
        total[file.writer] += sum(spec.bytes for spec in file.specs.values())
    return total


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 8), st.integers(0, 12), st.integers(1, 900)
)
def test_every_tensor_lies_in_one_file_and_no_file_is_too_large(
    sizes: list[int], ranks: int, wanted: int, limit: int
) -> None:
    specs = specs_of(sizes)
    files = share_out(specs, limit, [0] * ranks, wanted_files=wanted)
    assert sorted(name for file in files for name in file.specs) == sorted(specs)
    for file in files:
        assert len(file.specs) == 1 or sum(spec.bytes for spec in file.specs.values()) <= limit
        assert 0 <= file.writer < ranks and file.specs


@pytest.mark.parametrize("wanted", [1, 2, 5, 16])
def test_as_many_files_as_asked_for_of_about_equal_bytes(wanted: int) -> None:
    files = share_out(specs_of([100] * 160), 1 << 40, [0] * 4, wanted_files=wanted)
    assert len(files) == wanted
    assert max(written(files, [0] * 4)) <= 2 * 100 * 160 * max(1, -(-wanted // 4)) // wanted * 1.1


def test_small_weights_stay_one_file_whatever_the_number_of_ranks() -> None:
    assert [file.name for file in share_out(specs_of([1000] * 50), 1 << 40, [0] * 8)] == ["model.safetensors"]


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_the_ranks_of_a_large_model_write_equally_much(ranks: int) -> None:
    model = ModelConfig.model_validate({"preset": "llama2_7b"})
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in hf_shapes(model).items()}
    loads = [12 * model.parameters // ranks] * ranks
    total = written(share_out(specs, 10**10, loads), loads)
    assert min(spec.bytes for spec in specs.values()) < SMALL_FILE_BYTES
    assert max(total) < 1.06 * sum(total) / ranks


def test_a_rank_with_more_of_the_state_gets_less_of_the_weights() -> None:
    loads = [4000, 0, 0, 0]
    files = share_out(specs_of([100] * 30), 1 << 40, loads, wanted_files=6)
    total = written(files, loads)
    assert total == [4000, 2000, 2000, 2000]


def test_few_files_go_to_ranks_that_are_far_apart() -> None:
    files = share_out(specs_of([100] * 4), 1 << 40, [0] * 8, wanted_files=4)
    assert sorted(file.writer for file in files) == [0, 2, 4, 6]
