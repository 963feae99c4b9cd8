"""Megatron's settings and what a model is."""

from pathlib import Path

import pytest

from checkpoints_tools.errors import ConversionError
from checkpoints_tools.megatron_args import arguments_of, model_of_settings
from megalemur.config.model import ModelConfig, RopeScaling

WHERE = Path("common.pt")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def model(**changes):
    shape = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 4}
    return ModelConfig(**{**shape, "vocab_size": 251, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 8},
        {"num_query_groups": 1},
        {"tie_embeddings": True},
        {"rope_theta": 500000.0, "rope_scaling": RopeScaling(factor=32.0, **LLAMA3), "norm_eps": 1e-6},
    ],
)
def test_arguments_say_the_model_that_they_were_made_of(changes):
    wanted = model(**changes)
    assert model_of_settings(arguments_of(wanted, 256), WHERE) == wanted


def test_a_number_of_groups_that_megatron_does_not_use_is_not_used():
    settings = {**arguments_of(model(num_query_groups=8), 256), "num_query_groups": 1, "group_query_attention": False}
    assert model_of_settings(settings, WHERE).num_query_groups == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"swiglu": False}, "swiglu is False; a Llama has True"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'; a Llama has 'RMSNorm'"),
        ({"add_qkv_bias": True}, "add_qkv_bias is True"),
        ({"num_experts": 8}, "num_experts is 8; a Llama has none"),
        ({"kv_channels": 16}, "kv_channels is 16; 8 heads of hidden size 64 are 8 wide"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
        ({"rotary_base": None}, "rotary_base is missing"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_query_groups": 3}, "do not divide"),
        ({"num_layers": 10**9}, "at most"),
    ],
)
def test_settings_of_another_model_are_refused_by_name(changes, said):
    with pytest.raises(ConversionError, match=said):
        model_of_settings({**arguments_of(model(), 256), **changes}, WHERE)


def test_rotary_scaling_that_megatron_has_no_setting_for_is_refused():
    scaling = RopeScaling(factor=8.0, **{**LLAMA3, "original_max_position_embeddings": 4096})
    with pytest.raises(ConversionError, match="one setting, the factor"):
        arguments_of(model(rope_scaling=scaling), 256)


def test_nemos_rotary_scaling_is_read_with_its_own_names():
    settings = arguments_of(model(), 256) | {
        "use_rope_scaling": None,
        "scale_factor": 8,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "old_context_len": 8192,
    }
    assert model_of_settings(settings, WHERE).rope_scaling == RopeScaling(factor=8, **LLAMA3)
