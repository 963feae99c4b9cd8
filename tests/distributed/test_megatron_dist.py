"""torch_dist checkpoints and megatron-core itself: what it saves is read, what is written it loads."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_tools import conversion, megatron_write
from checkpoints_tools.conversion import Request, convert
from checkpoints_tools.errors import CertificateError, ConversionError
from checkpoints_tools.formats import FORMATS, open_any
from checkpoints_tools.layout import Options
from checkpoints_tools.megatron_args import arguments_of
from checkpoints_tools.megatron_dist import open_megatron, recognises
from checkpoints_tools.regions import Key
from megalemur.model.names import hf_shapes
from tests.support.megatron import load_by_megatron, save_by_megatron
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run, write_llama
from tests.support.weights import read_all, same_tensors

P = "parallel."
LAYOUTS = {
    "one": (),
    "tp2": (f"{P}tensor=2",),
    "pp2": (f"{P}pipeline=2",),
    "tp2 pp2": (f"{P}tensor=2", f"{P}pipeline=2"),
}
SHAPES = {
    "gqa": {},
    "mha, tied, odd": {"num_query_groups": 8, "tie_embeddings": True, "vocab_size": 301},
}
LAYERS = {"num_layers": 4}
NEMO_MODEL = """
_target_: nemo.collections.llm.gpt.model.llama.LlamaModel
config:
  _target_: nemo.collections.llm.gpt.model.llama.LlamaConfig
  activation_func: {_target_: torch.nn.functional.silu, _call_: false}
  add_bias_linear: false
  ffn_hidden_size: 96
  gated_linear_unit: true
  hidden_size: 64
  layernorm_epsilon: 1.0e-05
  make_vocab_size_divisible_by: 128
  normalization: RMSNorm
  num_attention_heads: 8
  num_layers: 4
  num_query_groups: 4
  position_embedding_type: rope
  rotary_base: 10000
  rotary_percent: 1.0
  seq_length: 128
  share_embeddings_and_output_weights: false
"""
TOKENS = torch.randint(0, 251, (2, 32), generator=torch.Generator().manual_seed(1))


def transformers_logits(directory):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits


def written_by_us(hf, destination, **options):
    source = open_any(hf)
    convert(source, source, Request(destination, "megatron", Options(**options)))
    return destination / "release"


def args_of(config):
    """Megatron-LM's arguments for a run of ours."""
    return arguments_of(config.model, config.parallel.padded_vocab(config.model.vocab_size))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [(layout, "gqa") for layout in LAYOUTS] + [("tp2 pp2", "mha, tied, odd")],
)
def test_megatron_loads_what_is_written_strictly(tmp_path, layout, shape):
    changes = {**LAYERS, **SHAPES[shape]}
    hf = write_llama(tmp_path / "hf", **changes)
    destination = written_by_us(hf, tmp_path / "megatron", pad_vocab_to=16)
    config = tiny_run(tmp_path, *LAYOUTS[layout], start_from=hf, **changes)
    ranks = run_ranks(
        config.parallel.world_size, load_by_megatron, destination, config, hf / "model.safetensors", TOKENS
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
def test_two_swapped_parts_of_a_fused_tensor_are_caught(tmp_path, monkeypatch, name):
    other = {"gate_proj": "up_proj", "k_proj": "v_proj"}[name]

    def swapped(*args):
        layout = megatron_write.lay_out(*args)
        regions = dict(layout.regions)
        for key in layout.regions:
            if name in key.name:
                twin = key._replace(name=key.name.replace(name, other))
                regions[key], regions[twin] = regions[twin], regions[key]
        return replace(layout, regions=regions)

    hf = write_llama(tmp_path / "hf", **LAYERS)
    source = open_any(hf)
    monkeypatch.setitem(FORMATS, "megatron", replace(FORMATS["megatron"], lay_out=swapped))
    monkeypatch.setattr(conversion, "_verify", lambda *_: None)
    convert(source, source, Request(tmp_path / "megatron", "megatron", Options(pad_vocab_to=16)))
    config = tiny_run(tmp_path, start_from=hf, **LAYERS)
    with pytest.raises(AssertionError, match=f"{name}|{other}"):
        run_ranks(1, load_by_megatron, tmp_path / "megatron" / "release", config, hf / "model.safetensors", TOKENS)
    assert not same_tensors(read_all(open_megatron(tmp_path / "megatron")), load_file(hf / "model.safetensors"))


def test_two_swapped_parts_are_caught_by_the_conversion_itself(tmp_path, monkeypatch):
    def swapped(*args):
        layout = megatron_write.lay_out(*args)
        one, other = (Key("weight", f"model.layers.2.mlp.{part}_proj.weight") for part in ("gate", "up"))
        regions = {**layout.regions, one: layout.regions[other], other: layout.regions[one]}
        return replace(layout, regions=regions)

    source = open_any(write_llama(tmp_path / "hf", **LAYERS))
    monkeypatch.setitem(FORMATS, "megatron", replace(FORMATS["megatron"], lay_out=swapped))
    with pytest.raises(CertificateError, match=r"layers\.2\.mlp"):
        convert(source, source, Request(tmp_path / "megatron", "megatron"))
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(
    ("layout", "shape"),
    [(layout, "gqa") for layout in LAYOUTS] + [("tp2 pp2", "mha, tied, odd")],
)
def test_what_megatron_saves_is_read_bit_for_bit(tmp_path, layout, shape):
    changes = {**LAYERS, **SHAPES[shape]}
    hf = write_llama(tmp_path / "hf", **changes)
    config = tiny_run(tmp_path, *LAYOUTS[layout], start_from=hf, **changes)
    saved = tmp_path / "saved" / "iter_0000010"
    run_ranks(config.parallel.world_size, save_by_megatron, saved, config, args_of(config))
    (saved.parent / "latest_checkpointed_iteration.txt").write_text("10")
    for path in (saved, saved.parent):
        assert recognises(path)
        opened = open_megatron(path)
        assert opened.model == config.model
        assert opened.facts["step"] == 10
        assert same_tensors(read_all(opened), load_file(hf / "model.safetensors"))


@pytest.mark.parametrize(
    ("overrides", "metadata"),
    [
        ((*LAYOUTS["tp2 pp2"], "parallel.chunks=2"), {}),
        ((*LAYOUTS["tp2"], "precision.dtype=bf16"), {}),
        (LAYOUTS["tp2 pp2"], {"non_homogeneous_layers": True}),
        (LAYOUTS["tp2"], {"singleton_local_shards": True}),
    ],
    ids=["interleaved", "bf16", "numbered layers", "fc1 as two tensors"],
)
def test_other_ways_to_save_are_read_bit_for_bit(tmp_path, overrides, metadata):
    hf = write_llama(tmp_path / "hf", dtype=torch.bfloat16, **LAYERS)
    config = tiny_run(tmp_path, *overrides, start_from=hf, **LAYERS)
    run_ranks(config.parallel.world_size, save_by_megatron, tmp_path / "saved", config, args_of(config), metadata)
    opened = open_megatron(tmp_path / "saved")
    found = read_all(opened)
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16 if "bf16" in overrides[-1] else torch.float32}
    assert same_tensors(
        {name: weight.bfloat16() for name, weight in found.items()}, load_file(hf / "model.safetensors")
    )


def test_nemo_names_and_folders_are_read(tmp_path):
    hf = write_llama(tmp_path / "hf", **LAYERS)
    config = tiny_run(tmp_path, *LAYOUTS["tp2"], start_from=hf, **LAYERS)
    run_ranks(2, save_by_megatron, tmp_path / "nemo" / "weights", config, None, {}, 0, "module.")
    with pytest.raises(ConversionError, match="--hf-config"):
        open_megatron(tmp_path / "nemo")
    assert same_tensors(read_all(open_megatron(tmp_path / "nemo", config.model)), load_file(hf / "model.safetensors"))
    (tmp_path / "nemo" / "context").mkdir()
    (tmp_path / "nemo" / "context" / "model.yaml").write_text(NEMO_MODEL)
    opened = open_megatron(tmp_path / "nemo")
    assert opened.model == config.model.model_copy(update={"vocab_size": 256})
    assert "vocabulary" in opened.notes[0]
    embedding = read_all(opened)["model.embed_tokens.weight"]
    assert torch.equal(embedding[:251], load_file(hf / "model.safetensors")["model.embed_tokens.weight"])
    assert not embedding[251:].any()


@pytest.mark.parametrize("layout", ["one", "tp2 pp2"])
def test_bf16_and_interleaved_chunks_load_what_is_written(tmp_path, layout):
    hf = write_llama(tmp_path / "hf", dtype=torch.bfloat16, **LAYERS)
    destination = written_by_us(hf, tmp_path / "megatron", pad_vocab_to=16, tensor=2)
    overrides = [*LAYOUTS[layout], "precision.dtype=bf16", *(["parallel.chunks=2"] if "pp2" in layout else [])]
    config = tiny_run(tmp_path, *overrides, start_from=hf, **LAYERS)
    ranks = run_ranks(
        config.parallel.world_size, load_by_megatron, destination, config, hf / "model.safetensors", TOKENS
    )
    elements = sum(weight.numel() for weight in load_file(hf / "model.safetensors").values())
    assert sum(sum(rank.compared.values()) for rank in ranks) >= elements


def test_the_state_that_transformer_engine_asks_for_is_there_on_demand(tmp_path):
    hf = write_llama(tmp_path / "hf", **LAYERS)
    config = tiny_run(tmp_path, start_from=hf, **LAYERS)
    asked = ("decoder.final_layernorm._extra_state",)
    without = written_by_us(hf, tmp_path / "local", pad_vocab_to=16)
    with_it = written_by_us(hf, tmp_path / "te", pad_vocab_to=16, transformer_engine=True)
    weights = hf / "model.safetensors"
    assert run_ranks(1, load_by_megatron, with_it, config, weights, TOKENS, asked)
    with pytest.raises(AssertionError, match=r"final_layernorm._extra_state"):
        run_ranks(1, load_by_megatron, without, config, weights, TOKENS, asked)
    with pytest.raises(AssertionError, match=r"final_layernorm._extra_state"):
        run_ranks(1, load_by_megatron, with_it, config, weights, TOKENS)


def saved_state(tmp_path, config, **metadata):
    """What megatron-core saved after two steps, opened; and the same state from the ranks, whole."""
    model, args = config.model, args_of(config)
    pieces = run_ranks(config.parallel.world_size, save_by_megatron, tmp_path / "saved", config, args, metadata, 2)
    state = {}
    for piece in [piece for rank in pieces for piece in rank]:
        shape = hf_shapes(model)[piece.name]
        whole = state.setdefault(piece.kind, {}).setdefault(piece.name, torch.full(shape, float("nan")))
        whole[piece.box.slices] = piece.tensor.view(piece.box.shape)
    return open_megatron(tmp_path / "saved"), state


@pytest.mark.parametrize(
    ("layout", "metadata"),
    [
        (("parallel.data=2", "parallel.tensor=2"), {"distrib_optim_sharding_type": "fully_reshardable"}),
        (("parallel.pipeline=2", "parallel.distributed_optimizer=false"), {}),
    ],
    ids=["distributed optimizer, tp2 dp2", "plain optimizer, pp2"],
)
def test_optimizer_state_is_read_bit_for_bit(tmp_path, layout, metadata):
    hf = write_llama(tmp_path / "hf", **LAYERS)
    config = tiny_run(tmp_path, *layout, "precision.dtype=bf16", start_from=hf, **LAYERS)
    opened, state = saved_state(tmp_path, config, **metadata)
    assert {key.kind for key in opened.dtypes} == {"weight", "master", "exp_avg", "exp_avg_sq"}
    for kind, tensors in state.items():
        assert same_tensors(read_all(opened, kind), tensors)
    weights = read_all(opened)
    assert all(torch.equal(weights[name], master.bfloat16()) for name, master in state["master"].items())


def test_optimizer_state_in_buckets_is_said_not_to_be_read(tmp_path):
    hf = write_llama(tmp_path / "hf", **LAYERS)
    config = tiny_run(tmp_path, start_from=hf, **LAYERS)
    opened, state = saved_state(tmp_path, config, distrib_optim_sharding_type="dp_reshardable")
    assert {key.kind for key in opened.dtypes} == {"weight"}
    assert "--dist-ckpt-optim-fully-reshardable" in "".join(opened.notes)
    assert same_tensors(read_all(opened), state["master"])
