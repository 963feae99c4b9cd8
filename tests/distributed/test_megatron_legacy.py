"""Rank files and megatron-core itself: what is written it loads strictly, what it holds is read."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools.conversion import Request, convert
from checkpoints_tools.formats import open_any
from checkpoints_tools.layout import Options
from checkpoints_tools.megatron_args import arguments_of
from tests.support.rank_files import load_as_megatron, save_as_megatron
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run, write_llama
from tests.support.weights import read_all, same_tensors

LAYERS = {"num_layers": 4}
SHAPES = {
    "gqa": {},
    "mha, tied, odd": {"num_query_groups": 8, "tie_embeddings": True, "vocab_size": 301},
    "fewer groups than ranks": {"num_query_groups": 1},
}
LAYOUTS = {
    "one": {},
    "tp2 pp2": {"tensor": 2, "pipeline": 2},
    "pp2 vp2": {"pipeline": 2, "chunks": 2},
}
TOKENS = torch.randint(0, 251, (2, 32), generator=torch.Generator().manual_seed(1))


def run_of(tmp_path, hf, layout, shape):
    overrides = [f"parallel.{name}={value}" for name, value in layout.items()]
    return tiny_run(tmp_path, *overrides, start_from=hf, **LAYERS, **shape)


def transformers_logits(directory):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits


def difference(tmp_path, hf, files, layout, shape):
    """Largest difference of megatron-core's logits, loaded from the files, to those of transformers."""
    config = run_of(tmp_path, hf, layout, shape)
    found = run_ranks(config.parallel.world_size, load_as_megatron, files / "release", config, TOKENS)
    logits = [one for one in found if one is not None]
    expected = transformers_logits(hf)
    assert logits and all(bool(one.isfinite().all()) for one in logits)
    return max(float((one - expected).abs().max()) for one in logits)


def to_ranks(hf, destination, layout):
    source = open_any(hf)
    convert(source, source, Request(destination, "megatron-legacy", Options(pad_vocab_to=16, **layout)))
    return destination


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("one", "mha, tied, odd"),
        ("tp2 pp2", "gqa"),
        ("tp2 pp2", "mha, tied, odd"),
        ("tp2 pp2", "fewer groups than ranks"),
        ("pp2 vp2", "fewer groups than ranks"),
    ],
)
def test_megatron_loads_what_is_written_strictly(tmp_path, layout, shape):
    hf = write_llama(tmp_path / "hf", **LAYERS, **SHAPES[shape])
    files = to_ranks(hf, tmp_path / "ranks", LAYOUTS[layout])
    assert difference(tmp_path, hf, files, LAYOUTS[layout], SHAPES[shape]) < 2e-5


@pytest.mark.parametrize(("one", "other"), [("gate_proj", "up_proj"), ("k_proj", "v_proj")])
def test_two_swapped_parts_of_a_fused_tensor_are_caught(tmp_path, one, other):
    hf, wrong = write_llama(tmp_path / "hf", **LAYERS), write_llama(tmp_path / "wrong", **LAYERS)
    weights = load_file(wrong / "model.safetensors")
    swap = {name: name.replace(one, "x").replace(other, one).replace("x", other) for name in weights}
    save_file({swap[name]: value for name, value in weights.items()}, wrong / "model.safetensors", {"format": "pt"})
    files = to_ranks(wrong, tmp_path / "ranks", LAYOUTS["tp2 pp2"])
    assert difference(tmp_path, hf, files, LAYOUTS["tp2 pp2"], {}) > 2e-5


@pytest.mark.parametrize(
    ("layout", "shape"), [("tp2 pp2", "gqa"), ("tp2 pp2", "mha, tied, odd"), ("pp2 vp2", "gqa"), ("one", "gqa")]
)
def test_what_megatron_holds_is_read(tmp_path, layout, shape):
    hf = write_llama(tmp_path / "hf", **LAYERS, **SHAPES[shape])
    config = run_of(tmp_path, hf, LAYOUTS[layout], SHAPES[shape])
    parallel = config.parallel
    args = {
        **arguments_of(config.model, parallel.padded_vocab(config.model.vocab_size)),
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
    }
    folder = tmp_path / "saved/iter_0000007"
    run_ranks(parallel.world_size, save_as_megatron, folder, config, args)
    (tmp_path / "saved/latest_checkpointed_iteration.txt").write_text("7\n")
    opened = open_any(tmp_path / "saved")
    assert opened.facts["step"] == 7 and opened.model == open_any(hf).model
    assert same_tensors(read_all(opened), load_file(hf / "model.safetensors"))
