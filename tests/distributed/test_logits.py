"""Logits in every layout against transformers, in fp32, with a control that must fail."""

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run, write_llama
from tests.support.training import logits_of

P = "parallel."
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
