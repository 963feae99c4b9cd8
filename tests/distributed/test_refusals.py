"""Wrong files are named before any process group exists."""

import json

import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run, write_data, write_llama


def refusal(config):
    """(type, message, whether a process group was begun) of starting the run."""
    import torch.distributed as dist

    from megalemur.train.run import train

    try:
        train(config)
    except Exception as error:
        return type(error).__name__, str(error), dist.is_initialized()
    return None


def refused(config):
    (found,) = run_ranks(1, refusal, config)
    kind, message, begun = found
    assert not begun
    return kind, message


def edit_weights(model, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor(tmp_path):
    model = write_llama(tmp_path / "hf")
    edit_weights(model, lambda weights: weights.pop("model.layers.3.mlp.up_proj.weight"))
    kind, message = refused(tiny_run(tmp_path, start_from=model))
    assert kind == "CheckpointError" and "model.layers.3.mlp.up_proj.weight is missing" in message


def test_a_tensor_of_another_shape(tmp_path):
    model = write_llama(tmp_path / "hf")
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_weights(model, lambda weights: weights.update({name: weights[name][:-1].clone()}))
    kind, message = refused(tiny_run(tmp_path, start_from=model))
    assert kind == "CheckpointError" and name in message and "[31, 64]" in message and "[32, 64]" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "istral"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_hidden_layers": 9}, "model.num_layers=8"),
    ],
)
def test_a_directory_of_another_model(tmp_path, changes, said):
    model = write_llama(tmp_path / "hf")
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    kind, message = refused(tiny_run(tmp_path, start_from=model))
    assert kind == "ValueError" and said in message and "config.json" in message


def test_a_missing_data_file(tmp_path):
    config = tiny_run(tmp_path, f"data.sources.0.path={tmp_path}/nowhere")
    kind, message = refused(config)
    assert kind.endswith("DataError") and "nowhere" in message


def test_tokens_that_the_model_does_not_have(tmp_path):
    write_data(tmp_path / "a", vocab_size=400, seed=0)
    kind, message = refused(tiny_run(tmp_path))
    assert kind == "VocabularyError" and "251" in message and str(tmp_path / "a") in message


def test_a_checkpoint_of_another_optimizer_is_resumed_only_when_asked(tmp_path):
    from tests.support.training import train_and_save

    (_,) = run_ranks(1, train_and_save, tiny_run(tmp_path, "run.stop_at=1"))
    other = tiny_run(tmp_path, "run.stop_at=2", "optim.kind=adamw")
    (found,) = run_ranks(1, refusal, other)
    assert found[0] == "ValueError" and "checkpoint.allow_changes" in found[1]
    asked = tiny_run(tmp_path, "run.stop_at=2", "optim.kind=adamw", "checkpoint.allow_changes=[optimizer]")
    assert run_ranks(1, refusal, asked) == [None]
