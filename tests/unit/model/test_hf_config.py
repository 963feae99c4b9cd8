"""config.json: what is accepted, what is refused, and that transformers reads back what it wrote."""

import json
from pathlib import Path
from typing import Any

import pytest

from megalemur.config.model import ModelConfig
from megalemur.model.hf_config import (
    DERIVED_TENSORS,
    check_model_matches,
    generation_config_json,
    hf_config_json,
    read_hf_config,
)

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "initializer_range": 0.03,
    "max_position_embeddings": 4096,
    "pretraining_tp": 1,
    "transformers_version": "4.31.0",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
OLD_TYPE_KEY = {("type" if key == "rope_type" else key): value for key, value in LLAMA3.items()}
ACCEPTED: dict[str, dict[str, Any]] = {
    "llama 2": {**BASE, "rope_scaling": None, "torch_dtype": "float16"},
    "theta": {**BASE, "rope_scaling": None, "rope_theta": 5e5, "torch_dtype": "bfloat16", "tie_word_embeddings": True},
    "llama 3": {**BASE, "rope_scaling": LLAMA3, "rope_theta": 5e5, "torch_dtype": "bfloat16"},
    "llama 3, old key": {**BASE, "rope_scaling": OLD_TYPE_KEY, "rope_theta": 5e5, "torch_dtype": "bfloat16"},
    "defaults": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"},
    "5, default": {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "float16"},
    "5, llama 3": {**BASE, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "dtype": "bfloat16"},
}


def write(directory: Path, values: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    data = values if isinstance(values, bytes) else json.dumps(values).encode()
    (directory / "config.json").write_bytes(data)
    return directory


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_passage_through_leaves_transformers_config_equal(case: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    source = write(tmp_path / "in", ACCEPTED[case])
    read = read_hf_config(source)
    written = write(tmp_path / "out", hf_config_json(read.model, dtype=str(read.dtype), source=read.original))

    assert LlamaConfig.from_pretrained(source).to_dict() == LlamaConfig.from_pretrained(written).to_dict()
    assert read_hf_config(written).model == read.model


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_written_speaks_to_transformers_4_as_well(case: str, tmp_path: Path) -> None:
    read = read_hf_config(write(tmp_path, ACCEPTED[case]))
    written = json.loads(hf_config_json(read.model, dtype=str(read.dtype), source=read.original))

    assert written["rope_theta"] == read.model.rope_theta
    assert (written["rope_scaling"] is None) == (read.model.rope_scaling is None)
    assert written["torch_dtype"] == written["dtype"] == read.dtype
    # a stray attribute would make transformers 4's config differ from the source's
    assert ("rope_parameters" in written) == ("rope_parameters" in ACCEPTED[case])


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_config_from_scratch_reads_back_as_the_same_model(case: str, tmp_path: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    model = read_hf_config(write(tmp_path / "in", ACCEPTED[case])).model
    directory = write(tmp_path / "out", hf_config_json(model, dtype="bfloat16"))
    (directory / "generation_config.json").write_bytes(generation_config_json(eos_token_id=7))

    config = LlamaConfig.from_pretrained(directory)
    assert read_hf_config(directory).model == model
    assert config.rope_parameters["rope_theta"] == model.rope_theta
    assert config.head_dim == model.head_dim and config.num_key_value_heads == model.num_query_groups
    assert GenerationConfig.from_pretrained(directory).eos_token_id == 7


def test_absent_keys_mean_what_transformers_means(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    read, theirs = read_hf_config(write(tmp_path, {"model_type": "llama"})), LlamaConfig()
    assert read.model.num_query_groups == theirs.num_key_value_heads == 32
    assert read.model.norm_eps == theirs.rms_norm_eps == 1e-6
    assert read.model.max_position_embeddings == theirs.max_position_embeddings == 2048
    assert read.model.ffn_hidden_size == theirs.intermediate_size
    assert read.model.num_layers == theirs.num_hidden_layers
    assert read.dtype is None


def test_both_spellings_of_llama3_scaling_are_one_model(tmp_path: Path) -> None:
    models = [read_hf_config(write(tmp_path / case, ACCEPTED[case])).model for case in ACCEPTED if "llama 3" in case]
    assert len(models) == 3 and models[0] == models[1] == models[2]
    assert models[0].rope_scaling is not None and models[0].rope_scaling.factor == 8.0


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


def test_a_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    """transformers computes the same logits of the same weights under either name, and the name is kept."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64}
    mistral = MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=None)).eval()
    mistral.save_pretrained(tmp_path / "m")
    read = read_hf_config(tmp_path / "m")
    llama = LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()
    llama.load_state_dict(mistral.state_dict())
    ids = torch.arange(40)[None]
    assert torch.equal(llama(ids).logits, mistral(ids).logits)
    assert read.model.num_query_groups == 4 and read.model.ffn_hidden_size == 96
    again = json.loads(hf_config_json(read.model, dtype="float32", source=read.original))
    assert again["model_type"] == "mistral" and again["sliding_window"] is None
    bare = read_hf_config(write(tmp_path, {"model_type": "mistral", "sliding_window": None})).model
    theirs = MistralConfig(sliding_window=None)
    assert bare.num_query_groups == theirs.num_key_value_heads
    assert bare.ffn_hidden_size == theirs.intermediate_size
    assert bare.max_position_embeddings == theirs.max_position_embeddings


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "qwen": ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "'qwen2'"),
    "a mistral's window": ({**MISTRAL, "sliding_window": 4096}, "sliding_window is 4096"),
    "a mistral that says nothing": ({**MISTRAL}, "sliding_window is 4096"),
    "another mistral": ({**MISTRAL, "sliding_window": None, "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias"),
    "activation": ({"hidden_act": "gelu"}, "'gelu'"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    "odd head": ({"hidden_size": 60}, "head_dim=15 is odd"),
    "indivisible": ({"hidden_size": 65}, "does not divide hidden_size=65"),
    "wide heads": ({"head_dim": 32}, "head_dim=32"),
    "groups": ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "partial rotary, 5": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "0.5"),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "'yarn'"),
    "incomplete": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
    "two thetas": ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "contradict"),
    "default theta": ({"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, "contradict"),
    "two scalings": ({"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 2.0}}, "contradict"),
    "outer length": ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 9}, "9 outside"),
    "not a number": ({"num_hidden_layers": "many"}, "num_layers"),
    "no layers": ({"num_hidden_layers": 0}, "num_layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_this_llama_is_not_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, said = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        read_hf_config(write(tmp_path, {**BASE, **change}))
    assert said in str(caught.value) and "config.json" in str(caught.value)


def test_all_refusals_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        read_hf_config(write(tmp_path, {**BASE, "attention_bias": True, "hidden_act": "relu"}))
    assert "attention_bias" in str(caught.value) and "relu" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"model_type": "llama", "model_type": "llama"}', "twice"),
        (b'{"model_type": "llama", "rms_norm_eps": NaN}', "NaN"),
        (b'{"model_type": "llama", "rope_theta": 1e999}', "double"),
        (b"[]", "object"),
        (b"{", "config.json"),
    ],
)
def test_loose_json_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        read_hf_config(write(tmp_path, data))


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        read_hf_config(tmp_path)


def test_differences_to_the_run_name_settings_and_file(tmp_path: Path) -> None:
    hf = read_hf_config(write(tmp_path, ACCEPTED["llama 3"]))
    check_model_matches(hf.model.model_copy(update={"backend": "torch", "init_std": 0.5}), hf)

    other = ModelConfig(**{**hf.model.model_dump(), "num_layers": 3, "rope_scaling": None})
    with pytest.raises(ValueError) as caught:
        check_model_matches(other, hf)
    message = str(caught.value)
    assert "model.num_layers=3, the file has 2" in message
    assert "model.rope_scaling=None" in message and str(hf.path) in message


def test_rotary_buffers_of_old_files_are_known() -> None:
    import re

    assert re.fullmatch(DERIVED_TENSORS, "model.layers.11.self_attn.rotary_emb.inv_freq")
    assert not re.fullmatch(DERIVED_TENSORS, "model.layers.11.self_attn.q_proj.weight")
