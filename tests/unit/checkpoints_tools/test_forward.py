"""The layer-streamed forward pass computes what transformers computes, and no mistake of a converter escapes it."""

import subprocess
import sys

import pytest
import torch

from checkpoints_tools import forward, mover
from checkpoints_tools.errors import RequestError
from megalemur.config.model import ModelConfig, RopeScaling
from tests.support.weights import MISTAKES, MemoryWeights, mistaken, random_tensors, tiny_model

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
PROMPTS = [[1, 17, 250, 3, 3, 9], [5], [(7 * k * k + 3) % 251 for k in range(100)]]


def transformers_logits(model: ModelConfig, tensors, prompts) -> torch.Tensor:
    """Eager attention, fp32, each prompt alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **model.rope_scaling.model_dump()}
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    theirs = LlamaForCausalLM(config).float()
    missing = theirs.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    theirs.tie_weights()
    with torch.no_grad():
        return torch.cat([theirs(torch.tensor([ids])).logits[0] for ids in prompts])


def noise(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 8},
        {"num_query_groups": 1},
        {"tie_embeddings": True},
        {"rope_theta": 500000.0, "norm_eps": 1e-6},
        {"rope_scaling": LLAMA3},
        {"num_attention_heads": 2, "num_query_groups": 2, "hidden_size": 48, "ffn_hidden_size": 136, "vocab_size": 253},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_are_those_of_transformers(changes, dtype, monkeypatch):
    monkeypatch.setattr(mover, "BLOCK_BYTES", 4000)  # a few rows at a time, and a last block of fewer
    model = tiny_model(**changes)
    tensors = random_tensors(model, dtype=dtype)
    ours = forward.logits(MemoryWeights(model, tensors), PROMPTS)
    theirs = transformers_logits(model, tensors, PROMPTS)
    assert ours.shape == (107, model.vocab_size) and theirs.abs().max() > 1
    assert noise(ours, theirs) < 1e-5


def test_llama3_scaling_at_its_own_size():
    """Head size 128 and 2,048 positions: bands that are kept, blended and stretched all turn far enough to be seen."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny_model(
        num_layers=1,
        hidden_size=256,
        ffn_hidden_size=64,
        num_attention_heads=2,
        num_query_groups=1,
        max_position_embeddings=4096,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(**scaling, original_max_position_embeddings=512),
    )
    tensors = random_tensors(model)
    prompts = [[(11 * k * k + 5 * k) % 251 for k in range(2048)]]
    ours = forward.logits(MemoryWeights(model, tensors), prompts)
    assert noise(ours, transformers_logits(model, tensors, prompts)) < 1e-5
    plain = forward.logits(MemoryWeights(model.model_copy(update={"rope_scaling": None}), tensors), prompts)
    assert noise(plain, ours) > 1e-3


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_far_outside_the_noise(mistake):
    model = tiny_model()
    tensors = random_tensors(model)
    right = forward.logits(MemoryWeights(model, tensors), PROMPTS)
    wrong = forward.logits(MemoryWeights(model, mistaken(mistake, model, tensors)), PROMPTS)
    assert noise(wrong, right) > 1e-2


def test_each_prompt_is_alone_and_no_token_sees_the_ones_behind_it():
    model = tiny_model()
    weights = MemoryWeights(model, random_tensors(model))
    together, first, cut = (forward.logits(weights, p) for p in (PROMPTS, PROMPTS[:1], [PROMPTS[2][:40]]))
    assert torch.allclose(together[:6], first, atol=1e-5)
    assert torch.allclose(together[7:47], cut, atol=1e-5)


def test_what_is_read_is_what_was_announced(monkeypatch):
    monkeypatch.setattr(mover, "BLOCK_BYTES", 4000)
    for changes in ({}, {"tie_embeddings": True}):
        model = tiny_model(**changes)
        weights, read = MemoryWeights(model, random_tensors(model)), []
        hidden = forward.last_hidden(weights, PROMPTS, read.append)
        forward.head_columns(weights, hidden, 0, model.vocab_size, read.append)
        assert sum(read) == forward.bytes_to_read(weights)


@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        ([], "no prompt"),
        ([[1], []], "prompt 2 is empty"),
        ([[1, 251]], "the id 251, and the model knows 0 to 250"),
        ([[-1]], "the id -1"),
        ([[1] * 129], "129 tokens, the model's context 128"),
    ],
    ids=["none", "empty", "beyond", "negative", "long"],
)
def test_prompts_that_cannot_be_run_are_refused(prompts, why):
    model = tiny_model()
    with pytest.raises(RequestError, match=why):
        forward.last_hidden(MemoryWeights(model, random_tensors(model)), prompts)


def test_it_shares_nothing_with_the_model_that_is_trained():
    code = (
        "import sys, checkpoints_tools.logit_difference\n"
        "shared = [name for name in sys.modules if name.startswith(('megatron', 'transformers', 'megalemur.model.'))]\n"
        "assert set(shared) <= {'megalemur.model.names', 'megalemur.model.hf_config'}, shared"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
