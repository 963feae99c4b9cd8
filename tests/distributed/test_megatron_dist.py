"""torch_dist checkpoints and megatron-core itself: what it saves is read, what is written it loads."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_tools.layout import Options
from checkpoints_tools.megatron_args import arguments_of
from checkpoints_tools.megatron_dist import open_megatron
from checkpoints_tools.megatron_write import lay_out
from tests.support.layouts import open_llama, read_all, write_layout
from tests.support.megatron import load_by_megatron, save_by_megatron
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run, write_llama

P = "parallel."
LAYOUTS = {
    "one": (),
    "tp2": (f"{P}tensor=2",),
    "pp2": (f"{P}pipeline=2",),
    "tp2 pp2": (f"{P}tensor=2", f"{P}pipeline=2"),
}
SHAPES = {
    "gqa": {},
    "mha": {"num_query_groups": 8},
    "tied": {"tie_embeddings": True},
    "odd": {"vocab_size": 301},
}
LAYERS = {"num_layers": 4}
TOKENS = torch.randint(0, 251, (2, 32), generator=torch.Generator().manual_seed(1))


def transformers_logits(directory):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits


def written_by_us(hf, destination, **options):
    opened = open_llama(hf)
    return write_layout(lay_out(opened, opened, Options(**options)), opened, destination)


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [(layout, "gqa") for layout in LAYOUTS] + [("tp2 pp2", "mha"), ("tp2 pp2", "tied"), ("tp2", "odd")],
)
def test_megatron_loads_what_is_written_strictly(tmp_path, layout, shape):
    changes = {**LAYERS, **SHAPES[shape]}
    hf = write_llama(tmp_path / "hf", **changes)
    destination = written_by_us(hf, tmp_path / "megatron", pad_vocab_to=16)
    config = tiny_run(tmp_path, *LAYOUTS[layout], start_from=hf, **changes)
    ranks = run_ranks(
        config.parallel.world_size, load_by_megatron, destination / "release", config, hf / "model.safetensors", TOKENS
    )
    weights = load_file(hf / "model.safetensors")
    for (
        name,
        weight,
    ) in weights.items():  # a norm is whole on every tensor-parallel rank, a tied embedding on two stages
        assert sum(rank.compared.get(name, 0) for rank in ranks) >= weight.numel(), name
    assert all(rank.padding == 0 for rank in ranks)
    logits = [rank.logits for rank in ranks if rank.logits is not None]
    expected = transformers_logits(hf)
    assert logits
    assert all(float((found - expected).abs().max()) < 2e-5 for found in logits)


@pytest.mark.parametrize("name", ["gate_proj", "k_proj"])
def test_two_swapped_parts_of_a_fused_tensor_are_caught(tmp_path, name):
    other = {"gate_proj": "up_proj", "k_proj": "v_proj"}[name]
    hf = write_llama(tmp_path / "hf", **LAYERS)
    opened = open_llama(hf)
    layout = lay_out(opened, opened, Options(pad_vocab_to=16))
    regions = dict(layout.regions)
    for key in layout.regions:
        if name in key.name:
            twin = key._replace(name=key.name.replace(name, other))
            regions[key], regions[twin] = regions[twin], regions[key]
    destination = write_layout(dataclasses.replace(layout, regions=regions), opened, tmp_path / "megatron")
    config = tiny_run(tmp_path, start_from=hf, **LAYERS)
    with pytest.raises(AssertionError, match=f"{name}|{other}"):
        run_ranks(1, load_by_megatron, destination / "release", config, hf / "model.safetensors", TOKENS)
    assert not same(read_all(open_megatron(destination)), load_file(hf / "model.safetensors"))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [(layout, "gqa") for layout in LAYOUTS] + [("tp2 pp2", "mha"), ("tp2 pp2", "tied"), ("tp2", "odd")],
)
def test_what_megatron_saves_is_read_bit_for_bit(tmp_path, layout, shape):
    changes = {**LAYERS, **SHAPES[shape]}
    hf = write_llama(tmp_path / "hf", **changes)
    config = tiny_run(tmp_path, *LAYOUTS[layout], start_from=hf, **changes)
    model = open_llama(hf).model
    args = arguments_of(model, config.parallel.padded_vocab(model.vocab_size))
    saved = tmp_path / "saved" / "iter_0000010"
    run_ranks(config.parallel.world_size, save_by_megatron, saved, config, args)
    (saved.parent / "latest_checkpointed_iteration.txt").write_text("10")
    for path in (saved, saved.parent):
        opened = open_megatron(path)
        assert opened.model == model
        assert opened.facts["step"] == 10
        assert same(read_all(opened), load_file(hf / "model.safetensors"))
