"""Rank files of Megatron-LM without megatron-core: what is written is read, what is wrong is named."""

import io
import itertools
import random
import shutil
import signal
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as load_safetensors
from typer.testing import CliRunner

from checkpoints_tools import convert as command
from checkpoints_tools import megatron_legacy_write
from checkpoints_tools.changes import Cast
from checkpoints_tools.conversion import Request, convert
from checkpoints_tools.errors import ConversionError
from checkpoints_tools.formats import open_any
from checkpoints_tools.layout import Options
from checkpoints_tools.megatron_args import arguments_of
from megalemur.checkpoint.errors import DamagedCheckpoint
from tests.support.rank_files import chunk_state, edit_rank, file_of, in_old_style, load_file, save_ranks
from tests.support.tiny import write_llama
from tests.support.weights import MemoryWeights, random_tensors, read_all, same_tensors, tiny_model

QKV, FC1 = "decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.0.mlp.linear_fc1.weight"
LAYERS = {"num_layers": 4}


def to_ranks(hf, destination, **options):
    source = open_any(hf)
    convert(source, source, Request(destination, "megatron-legacy", Options(**{"pad_vocab_to": 8, **options})))
    return destination


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("hf"), **LAYERS)


@pytest.fixture(scope="module")
def written(hf, tmp_path_factory):
    """Two tensor-parallel ranks, two stages."""
    return to_ranks(hf, tmp_path_factory.mktemp("written") / "ranks", tensor=2, pipeline=2)


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy") / "release"


def weights_of(directory):
    return load_safetensors(directory / "model.safetensors")


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ({}, torch.float32, {"tensor": 2, "pipeline": 2, "chunks": 2}),
        ({"num_query_groups": 8}, torch.float16, {"tensor": 4}),
        ({"tie_embeddings": True, "vocab_size": 301}, torch.bfloat16, {"tensor": 2, "pipeline": 4}),
        ({"tie_embeddings": True}, torch.float32, {"transformer_engine": True}),
        ({"num_query_groups": 2, "vocab_size": 33}, torch.bfloat16, {"tensor": 4, "pipeline": 2}),
        ({"num_query_groups": 1}, torch.float16, {"tensor": 4, "transformer_engine": True, "pipeline": 2}),
    ],
    ids=["gqa", "mha fp16", "tied odd bf16", "tied one stage", "fewer groups than ranks, a rank of padding", "te mqa"],
)
def test_there_and_back_is_the_identity(tmp_path, shape, dtype, layout):
    hf = write_llama(tmp_path / "hf", dtype=dtype, **LAYERS, **shape)
    between = open_any(to_ranks(hf, tmp_path / "ranks", **layout))
    assert between.format == "megatron-legacy" and between.model == open_any(hf).model and between.notes == ()
    convert(between, between, Request(tmp_path / "back", "hf", workers=3))
    assert same_tensors(weights_of(tmp_path / "back"), weights_of(hf))


def test_every_layout_holds_the_same_weights(tmp_path, hf):
    wanted, seen = weights_of(hf), 0
    for tensor, pipeline, chunks in itertools.product((1, 2, 4), repeat=3):
        if pipeline * chunks <= LAYERS["num_layers"] and (pipeline > 1 or chunks == 1):
            folder = to_ranks(hf, tmp_path / f"{seen}", tensor=tensor, pipeline=pipeline, chunks=chunks)
            assert len(list(folder.glob("release/mp_rank_*"))) == tensor * pipeline
            assert same_tensors(read_all(open_any(folder)), wanted), (tensor, pipeline, chunks)
            seen += 1
    assert seen == 12


def te_names(state):
    """As Transformer Engine's layers call their norms."""
    return {
        name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight").replace(
            "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
        ): value
        for name, value in state.items()
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("names", [dict, te_names], ids=["local", "te"])
def test_a_rank_holds_what_cutting_and_joining_gives(tmp_path, names, tied):
    hf = write_llama(tmp_path / "hf", tie_embeddings=tied)
    te = names is te_names
    folder = to_ranks(hf, tmp_path / "ranks", tensor=2, pipeline=2, chunks=2, transformer_engine=te)
    model, weights = open_any(hf).model, weights_of(hf)
    for rank, stage in itertools.product(range(2), repeat=2):
        tree = load_file(file_of(folder / "release", rank, stage))
        for chunk in range(2):
            first, ends = 4 * chunk + 2 * stage, (stage + chunk == 0, stage + chunk == 2)
            wanted = chunk_state(weights, model, range(first, first + 2), tensor=2, rank=rank, rows=256, ends=ends)
            found = tree[f"model{chunk}"]
            assert same_tensors({name: value for name, value in found.items() if value is not None}, names(wanted))
            assert all(name.endswith("._extra_state") for name, value in found.items() if value is None)


def test_the_files_say_what_megatron_looks_for(written):
    assert (written / "latest_checkpointed_iteration.txt").read_text() == "release"
    tree = load_file(file_of(written / "release", 1, 1))
    assert (tree["checkpoint_version"], tree["iteration"]) == (3.0, 0)
    args = vars(tree["args"])
    wanted = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "padded_vocab_size": 256, "swiglu": True}
    wanted |= {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "ckpt_format": "torch"}
    assert {name: args[name] for name in wanted} == wanted and args["virtual_pipeline_model_parallel_size"] is None


def test_the_archives_check_sums_are_right(written):
    for file in written.rglob("*.pt"):
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None


@pytest.mark.parametrize("where", ["", "release"])
def test_the_folder_above_and_the_iterations_own_are_known(written, where):
    assert open_any(written / where).facts["tensor_parallel"] == 2


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_changes_no_byte(tmp_path, hf, written, workers):
    source = open_any(hf)
    options = Options(pad_vocab_to=8, tensor=2, pipeline=2)
    convert(source, source, Request(tmp_path / "b", "megatron-legacy", options, workers=workers))
    for file in written.rglob("*.pt"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(written)).read_bytes(), file


def test_a_conversion_that_ended_at_its_end_is_gone_on_with(tmp_path, hf, written, monkeypatch):
    source, wrote = open_any(hf), []

    def write_one(path, frames):
        if wrote:
            raise OSError("no more")
        wrote.append(path)

    options = Options(pad_vocab_to=8, tensor=2, pipeline=2)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no more"):
        patch.setattr(megatron_legacy_write, "write_frames", write_one)
        convert(source, source, Request(tmp_path / "b", "megatron-legacy", options))
    assert not (tmp_path / "b").exists()
    convert(source, source, Request(tmp_path / "b", "megatron-legacy", options, resume=True))
    for file in written.rglob("*.pt"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(written)).read_bytes(), file


def test_the_command_takes_the_layout(tmp_path, hf):
    arguments = [hf, tmp_path / "out", "--to", "megatron-legacy", "--tensor", 2, "--pipeline", 4, "--pad-vocab-to", 16]
    done = CliRunner().invoke(command.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert same_tensors(read_all(open_any(tmp_path / "out")), weights_of(hf))
    assert file_of(tmp_path / "out/release", 1, 3).is_file()


# files of Megatron-LM


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=6)


@pytest.fixture(scope="module")
def tensors(model):
    return random_tensors(model)


STAGES = {
    "one": [[range(6)]],
    "uneven": [[range(1)], [range(1, 5)], [range(5, 6)]],
    "chunks": [[[0], [2, 3]], [[1], [4, 5]]],
    "an embedding alone": [[[]], [range(4)], [range(4, 6)]],
}


@pytest.mark.parametrize("style", [dict, te_names, in_old_style], ids=["core", "te", "old"])
@pytest.mark.parametrize("stages", STAGES)
def test_what_megatron_saves_is_read(tmp_path, model, tensors, stages, style):
    args = arguments_of(model, 256)
    del args["tensor_model_parallel_size"], args["pipeline_model_parallel_size"]
    folder = save_ranks(tmp_path / "a", tensors, model, STAGES[stages], tensor=2, args=args, style=style)
    opened = open_any(folder)
    assert opened.facts["step"] == 10 and opened.model == model
    assert same_tensors(read_all(opened), tensors)


def test_parameters_may_be_views_of_one_buffer(tmp_path, model, tensors):
    folder = save_ranks(tmp_path / "a", tensors, model, STAGES["one"], args=arguments_of(model, 256))

    def pack(tree):
        state, buffer = tree["model"], torch.cat([value.flatten() for value in tree["model"].values()])
        at = 0
        for name, value in state.items():
            state[name] = buffer[at : at + value.numel()].view(value.shape)
            at += value.numel()

    edit_rank(file_of(folder / "iter_0000010", 0), pack)
    assert same_tensors(read_all(open_any(folder)), tensors)


def test_what_is_no_weight_is_passed_over_and_said(tmp_path, model, tensors):
    folder = save_ranks(tmp_path / "a", tensors, model, STAGES["one"], args=arguments_of(model, 256))

    def add(tree):
        tree["optimizer"] = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}}
        tree["opt_param_scheduler"] = {"max_lr": 1e-4, "num_steps": 10}
        tree["rng_state"] = [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.RandomState(0).get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "rng_tracker_states": {},
            }
        ]
        tree["args"].params_dtype, tree["args"].exit_signal = torch.bfloat16, signal.SIGTERM
        tree["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(4, dtype=torch.uint8)
        tree["model"]["decoder.layers.0.mlp.linear_fc2._extra_state"] = io.BytesIO(b"scales")
        tree["model"]["rotary_pos_emb.inv_freq"] = torch.zeros(4)

    edit_rank(file_of(folder / "iter_0000010", 0), add)
    opened = open_any(folder)
    assert same_tensors(read_all(opened), tensors)
    said = "; ".join(opened.notes)
    assert "optimizer, opt_param_scheduler, rng_state" in said and "BytesIO" in said and "differ" not in said


def test_the_old_files_copy_of_a_tied_embedding_is_known(tmp_path):
    model = tiny_model(num_layers=2, tie_embeddings=True)
    tensors = random_tensors(model)

    def tied(state):
        found = in_old_style(state)
        if "output_layer" in found["language_model"]:
            found["word_embeddings_for_head"] = found["language_model"].pop("output_layer")
        return found

    args = {**arguments_of(model, 256), "pipeline_model_parallel_size": 2}
    opened = open_any(save_ranks(tmp_path / "a", tensors, model, [[[0]], [[1]]], args=args, style=tied))
    assert opened.model.tie_embeddings and same_tensors(read_all(opened), tensors)


def test_without_args_the_model_must_be_given(tmp_path, model, tensors):
    folder = save_ranks(tmp_path / "a", tensors, model, STAGES["uneven"], tensor=2)
    with pytest.raises(ConversionError, match=r"has no args.*--hf-config"):
        open_any(folder)
    assert same_tensors(read_all(open_any(folder, model=model)), tensors)


def test_the_command_takes_a_config_for_files_without_args(tmp_path, hf):
    model = open_any(hf).model
    folder = save_ranks(tmp_path / "a", weights_of(hf), model, [[range(4)]])
    arguments = [str(folder), str(tmp_path / "out"), "--to", "hf"]
    assert CliRunner().invoke(command.app, arguments).exit_code != 0
    done = CliRunner().invoke(command.app, [*arguments, "--hf-config", str(hf)])
    assert done.exit_code == 0, done.output
    assert same_tensors(weights_of(tmp_path / "out"), weights_of(hf))


def test_a_vocabulary_whose_true_size_nobody_says_keeps_its_padding(tmp_path, model, tensors):
    args = {**arguments_of(model, 256), "vocab_size": None}
    opened = open_any(save_ranks(tmp_path / "a", tensors, model, STAGES["one"], args=args))
    assert opened.model.vocab_size == 256 and "true size of the vocabulary" in opened.notes[0]


# what is wrong


def damage(edit, rank=1, stage=1):
    return lambda folder: edit_rank(file_of(folder, rank, stage), edit)


def remove(rank, stage):
    return lambda folder: shutil.rmtree(file_of(folder, rank, stage).parent)


def everywhere(edit):
    return lambda folder: [edit_rank(file, edit) for file in folder.rglob("*.pt")]


def truncate(folder):
    with open(file_of(folder, 1, 1), "r+b") as file:
        file.truncate(file.seek(0, 2) - 5000)


def number_layers_from_the_models_first(tree):
    state = tree["model"]
    tree["model"] = {
        name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.2."): state[name] for name in state
    }


def set_state(name, value):
    return lambda tree: tree["model"].__setitem__(name, value)


WRONG = {
    "a rank is missing": (remove(1, 0), "mp_rank_01_000/model_optim_rng.pt is missing"),
    "the last rank is missing": (lambda f: [remove(1, s)(f) for s in (0, 1)], "tensor_model_parallel_size is 2"),
    "the last stage is missing": (lambda f: [remove(t, 1)(f) for t in (0, 1)], "pipeline_model_parallel_size is 2"),
    "a number far off": (lambda f: (f / "mp_rank_99999_99999").mkdir(), "mp_rank_00_002/model_optim_rng.pt is missing"),
    "a folder is empty": (lambda f: file_of(f, 0, 1).unlink(), "mp_rank_00_001/model_optim_rng.pt is missing"),
    "a folder of experts": (lambda f: (f / "mp_rank_00_000_001").mkdir(), "experts have a third"),
    "a shape": (damage(set_state(QKV, torch.zeros(60, 64))), r"mp_rank_01_001.*linear_qkv.*\[60, 64\].*\[64, 64\]"),
    "a bias": (everywhere(set_state("decoder.layers.0.mlp.linear_fc1.bias", torch.zeros(9))), "bias: no Llama has it"),
    "a key": (damage(lambda tree: tree["model"].pop(FC1)), "linear_fc1.weight is in one of"),
    "no weight": (damage(set_state(FC1, "text")), "linear_fc1.weight is no tensor"),
    "a dtype": (damage(set_state(FC1, torch.zeros(96, 64).double())), "linear_fc1.weight is torch.float64"),
    "two dtypes": (damage(set_state(FC1, torch.zeros(96, 64).half())), "several dtypes"),
    "strides": (damage(set_state(FC1, torch.zeros(64, 96).t())), "strides"),
    "layers": (damage(number_layers_from_the_models_first), "layers are numbered 2, 3"),
    "iterations": (damage(lambda tree: tree.update(iteration=5)), "is of iteration 5"),
    "other activations": (damage(lambda tree: setattr(tree["args"], "swiglu", False), 0, 0), "swiglu is False"),
    "other depth": (damage(lambda tree: setattr(tree["args"], "num_layers", 5), 0, 0), "the stages hold 2, 2 layers"),
    "other width": (damage(lambda tree: setattr(tree["args"], "ffn_hidden_size", 92), 0, 0), "linear_fc1"),
    "a head that is no embedding": (
        damage(lambda tree: setattr(tree["args"], "untie_embeddings_and_output_weights", False), 0, 0),
        "output_layer.weight is not the embedding.*tie_word_embeddings false",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named(copy, spoil, said):
    spoil(copy)
    with pytest.raises(ConversionError, match=f"(?s){said}"):
        open_any(copy)


@pytest.mark.parametrize("spoil", [truncate, damage(lambda tree: tree.pop("model"))], ids=["cut short", "no model"])
def test_a_damaged_file_is_named(copy, spoil):
    spoil(copy)
    with pytest.raises(DamagedCheckpoint, match=r"mp_rank_01_001/model_optim_rng\.pt"):
        open_any(copy)


def test_norms_that_differ_between_ranks_are_said(copy, hf):
    edit_rank(file_of(copy, 1, 0), lambda tree: tree["model"]["decoder.layers.1.input_layernorm.weight"].add_(1))
    opened = open_any(copy)
    assert any("1 tensors" in note and "layers.1.input_layernorm" in note for note in opened.notes)
    assert same_tensors(read_all(opened), weights_of(hf))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_tied_head_is_compared_to_its_last_row(tmp_path, rank, monkeypatch):
    monkeypatch.setattr("checkpoints_tools.copies._BLOCK_BYTES", 1000)
    hf = write_llama(tmp_path / "hf", tie_embeddings=True)
    folder = to_ranks(hf, tmp_path / "ranks", tensor=2, pipeline=2) / "release"
    assert same_tensors(read_all(open_any(folder)), weights_of(hf))

    def turn(tree):
        tree["model"]["output_layer.weight"].view(torch.int32)[-1, -2] ^= 1

    edit_rank(file_of(folder, rank, 1), turn)
    message = rf"mp_rank_{rank:02d}_001.*output_layer.weight is not the embedding \(first at \[127, 62\]\)"
    with pytest.raises(ConversionError, match=message):
        open_any(folder)


def test_layers_in_another_order_are_other_weights(copy, hf):
    folders = [file_of(copy, rank, stage).parent for rank, stage in itertools.product(range(2), repeat=2)]
    states = [load_file(folder / "model_optim_rng.pt")["model"] for folder in folders]
    for folder, state in zip(folders, states, strict=True):
        swapped = {
            name.replace("layers.0.", "layers.x.")
            .replace("layers.1.", "layers.0.")
            .replace("layers.x.", "layers.1."): value
            for name, value in state.items()
        }
        edit_rank(folder / "model_optim_rng.pt", lambda tree, swapped=swapped: tree.update(model=swapped))
    assert not same_tensors(read_all(open_any(copy)), weights_of(hf))


@pytest.mark.parametrize(("change", "said"), [({"checkpoint_version": 1.0}, "before 2.0"), ({"args": None}, "no args")])
def test_old_files_whose_rows_have_another_order_are_refused(tmp_path, model, tensors, change, said):
    args = arguments_of(model, 256)
    folder = save_ranks(tmp_path / "a", tensors, model, STAGES["one"], args=args, style=in_old_style)
    edit_rank(file_of(folder / "iter_0000010", 0), lambda tree: tree.update(change))
    with pytest.raises(ConversionError, match=said if said != "no args" else "args.swiglu is not true"):
        open_any(folder, model=model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor": 3}, "--tensor 3 does not divide 8 attention heads"),
        ({"tensor": 16}, "--tensor 16 does not divide 8 attention heads"),
        ({"pipeline": 3}, "--pipeline 3 x --chunks 1 does not divide 4 layers"),
        ({"pipeline": 2, "chunks": 4}, "--pipeline 2 x --chunks 4 does not divide 4 layers"),
        ({"chunks": 2}, "--chunks 2 needs --pipeline above 1"),
        ({"tensor": 0}, "1 or more"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(tmp_path, hf, options, said):
    with pytest.raises(ConversionError, match=said):
        to_ranks(hf, tmp_path / "ranks", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_layout_for_a_format_that_has_none_is_refused(tmp_path, hf):
    source = open_any(hf)
    with pytest.raises(ConversionError, match=r"--to hf has no layout"):
        convert(source, source, Request(tmp_path / "out", "hf", Options(tensor=2)))


def test_parts_of_one_matrix_in_two_dtypes_are_refused(tmp_path, hf):
    source, model = open_any(hf), tiny_model(num_layers=4)
    tensors = random_tensors(model)
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"].bfloat16()
    weights = MemoryWeights(model, tensors)
    with pytest.raises(ConversionError, match=r"layers\.2\.mlp\.up_proj.weight is torch.bfloat16.*--dtype"):
        convert(weights, source, Request(tmp_path / "ranks", "megatron-legacy"))
    convert(Cast(weights, torch.bfloat16), source, Request(tmp_path / "ranks", "megatron-legacy"))
    assert load_file(file_of(tmp_path / "ranks/release", 0))["args"].bf16
