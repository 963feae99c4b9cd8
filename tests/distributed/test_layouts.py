"""Every layout computes what one process computes, from the same checkpoint."""

import pytest
import torch

from megalemur.config.run import RunConfig
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run, write_llama
from tests.support.training import logits_of, losses_and_norms

P = "parallel."
UNEVEN = (f"{P}pipeline=4", f"{P}first_stage_layers=1", f"{P}last_stage_layers=1")
FULL = "precision.recompute=full"
LAYOUTS = {
    "tp2": (f"{P}tensor=2",),
    "tp4 without sequence parallelism": (f"{P}tensor=4", f"{P}sequence=false"),
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
    "recompute full block, tp2": (f"{P}tensor=2", FULL, "precision.recompute_method=block"),
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


@pytest.mark.parametrize("layout", [(f"{P}tensor=4",), (f"{P}tensor=4", f"{P}pipeline=2")], ids=["tp4", "tp4 pp2"])
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
    config = tiny_run(tmp_path, *short, f"{P}tensor={tensor}", start_from=model, vocab_size=vocab)
    alone = tiny_run(tmp_path, "run.steps=4", f"{P}pad_vocab_to=1", start_from=model, vocab_size=vocab)
    (expected,) = run_ranks(1, losses_and_norms, alone)
    assert_same(config, expected)


def test_tied_embeddings_train_alike_on_one_stage_and_on_two(tmp_path):
    model = write_llama(tmp_path / "hf", tie_embeddings=True)
    alone = tiny_run(tmp_path, start_from=model, tie_embeddings=True)
    (expected,) = run_ranks(1, losses_and_norms, alone)
    assert_same(tiny_run(tmp_path, f"{P}pipeline=2", f"{P}tensor=2", start_from=model, tie_embeddings=True), expected)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def transformers_logits(directory, tokens):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits


def compare_logits(config, model, tokens):
    expected = transformers_logits(model, tokens)
    found = [
        logits for logits in run_ranks(config.parallel.world_size, logits_of, config, tokens) if logits is not None
    ]
    assert found
    return max(float((logits - expected).abs().max()) for logits in found)


@pytest.mark.parametrize(
    "layout",
    [(), (f"{P}tensor=2",), (f"{P}pipeline=4",), (f"{P}tensor=2", f"{P}pipeline=2", f"{P}chunks=2")],
    ids=["one", "tp2", "pp4", "tp2 pp2 interleaved"],
)
@pytest.mark.parametrize("shape", [{}, {"num_query_groups": 8}, {"vocab_size": 301}], ids=["gqa", "mha", "odd"])
def test_logits_agree_with_transformers(tmp_path, layout, shape):
    model = write_llama(tmp_path / "hf", **shape)
    config = tiny_run(tmp_path, *layout, start_from=model, **shape)
    tokens = torch.randint(0, 251, (2, 64), generator=torch.Generator().manual_seed(1))
    assert compare_logits(config, model, tokens) < 2e-5


def llama3_run(tmp_path, **rope):
    shape = {"num_layers": 2, "hidden_size": 256, "num_attention_heads": 2, "num_query_groups": 1}
    model = write_llama(tmp_path / "hf", max_position_embeddings=4096, rope_parameters=LLAMA3, **shape)
    scaling = {key: value for key, value in {**LLAMA3, **rope}.items() if key not in ("rope_type", "rope_theta")}
    config = tiny_run(
        tmp_path, start_from=model, max_position_embeddings=4096, rope_theta=500000.0, rope_scaling=scaling, **shape
    )
    return config, model


def test_logits_with_llama3_scaling_agree_with_transformers(tmp_path):
    config, model = llama3_run(tmp_path)
    tokens = torch.randint(0, 251, (1, 2048), generator=torch.Generator().manual_seed(1))
    assert compare_logits(config, model, tokens) < 2e-5


def swap_rotary_halves(model):
    """Permute the rows of the queries as Meta's files have them: a mistake that trains, and says nothing."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    for name, value in weights.items():
        if "q_proj" in name:
            heads = value.view(8, 2, 4, 64)
            weights[name] = heads.transpose(1, 2).reshape(64, 64).contiguous()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_permuted_rotary_halves_are_caught_by_the_bound(tmp_path):
    right, wrong = write_llama(tmp_path / "right"), write_llama(tmp_path / "wrong")
    swap_rotary_halves(wrong)
    config = tiny_run(tmp_path, start_from=wrong)
    tokens = torch.randint(0, 251, (2, 64), generator=torch.Generator().manual_seed(1))
    assert compare_logits(config, right, tokens) > 2e-5
