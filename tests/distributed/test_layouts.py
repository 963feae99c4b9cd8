"""Every layout computes what one process computes, from the same checkpoint."""

import pytest
import torch

from megalemur.config.run import RunConfig
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run, write_llama
from tests.support.training import losses_and_norms

P = "parallel."
# collectives of processes that share two cores are slow: larger micro-batches where tensor parallelism makes many
B = "data.micro_batch_size"
UNEVEN = (f"{P}pipeline=4", f"{P}first_stage_layers=1", f"{P}last_stage_layers=1")
FULL = "precision.recompute=full"
LAYOUTS = {
    "tp2": (f"{P}tensor=2", f"{B}=4"),
    "tp4 without sequence parallelism": (f"{P}tensor=4", f"{P}sequence=false", f"{B}=8"),
    "pp2": (f"{P}pipeline=2",),
    "pp4": (f"{P}pipeline=4",),
    "pp4 uneven": UNEVEN,
    "pp2 interleaved": (f"{P}pipeline=2", f"{P}chunks=2"),
    "pp4 interleaved": (f"{P}pipeline=4", f"{P}chunks=2"),
    "dp2": (f"{P}data=2",),
    "dp4 without distributed optimizer": (f"{P}data=4", f"{P}distributed_optimizer=false"),
    "dp2 overlapped": (f"{P}data=2", f"{P}overlap_grad_reduce=true", f"{P}overlap_param_gather=true"),
    "tp2 pp2 dp2 interleaved": (f"{P}tensor=2", f"{P}pipeline=2", f"{P}chunks=2", f"{P}data=2"),
    "tp2 pp2 interleaved overlapped dp2": (
        *(f"{P}tensor=2", f"{P}pipeline=2", f"{P}chunks=2", f"{P}data=2"),
        *(f"{P}overlap_grad_reduce=true", f"{P}overlap_param_gather=true"),
    ),
    "recompute full uniform, pp2": (f"{P}pipeline=2", FULL, "precision.recompute_layers=2"),
    "recompute full block, tp2": (f"{P}tensor=2", f"{B}=8", FULL, "precision.recompute_method=block"),
    "recompute attention and mlp": ("precision.recompute=selective", "precision.recompute_modules=[core_attn,mlp]"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    directory = tmp_path_factory.mktemp("layouts")
    model = write_llama(directory / "hf")
    config = tiny_run(directory, start_from=model)
    (results,) = run_ranks(1, losses_and_norms, config)
    return directory, model, results


def assert_same(config: RunConfig, expected):
    for results in run_ranks(config.parallel.world_size, losses_and_norms, config):
        assert torch.tensor(results) == pytest.approx(torch.tensor(expected), rel=1e-5, abs=0)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_ten_steps_equal_those_of_one_process(reference, layout):
    directory, model, expected = reference
    assert_same(tiny_run(directory, *layout, start_from=model), expected)


@pytest.mark.parametrize(
    "layout", [(f"{P}tensor=4", f"{B}=8"), (f"{P}tensor=4", f"{P}pipeline=2", f"{B}=4")], ids=["tp4", "tp4 pp2"]
)
def test_fewer_key_value_heads_than_tensor_ranks(tmp_path, layout):
    model = write_llama(tmp_path / "hf", num_query_groups=2)
    alone = tiny_run(tmp_path, start_from=model, num_query_groups=2)
    (expected,) = run_ranks(1, losses_and_norms, alone)
    assert_same(tiny_run(tmp_path, *layout, start_from=model, num_query_groups=2), expected)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(("vocab", "multiple"), [(251, 1), (250, 96), (257, 64)])
def test_vocabulary_padding_never_enters_the_loss(tmp_path, tensor, vocab, multiple):
    # (250, 96) at TP4 leaves a whole rank with nothing but padding
    model = write_llama(tmp_path / "hf", vocab_size=vocab)
    short = ("run.steps=4", f"{P}pad_vocab_to={multiple if tensor > 1 else 1}")
    config = tiny_run(tmp_path, *short, f"{P}tensor={tensor}", f"{B}=8", start_from=model, vocab_size=vocab)
    alone = tiny_run(tmp_path, "run.steps=4", f"{P}pad_vocab_to=1", start_from=model, vocab_size=vocab)
    (expected,) = run_ranks(1, losses_and_norms, alone)
    assert_same(config, expected)


def test_tied_embeddings_train_alike_on_one_stage_and_on_two(tmp_path):
    model = write_llama(tmp_path / "hf", tie_embeddings=True)
    alone = tiny_run(tmp_path, start_from=model, tie_embeddings=True)
    (expected,) = run_ranks(1, losses_and_norms, alone)
    assert_same(tiny_run(tmp_path, f"{P}pipeline=2", f"{P}tensor=2", start_from=model, tie_embeddings=True), expected)
