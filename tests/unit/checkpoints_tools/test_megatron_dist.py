"""torch_dist checkpoints without megatron-core: what is written is read, what is wrong is named."""

import io
import itertools
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_tools.changes import Cast
from checkpoints_tools.conversion import Request, convert
from checkpoints_tools.errors import ConversionError
from checkpoints_tools.foreign import DcpChunk, DcpTensor, dump_archive, dump_dcp_metadata, read_dcp_metadata
from checkpoints_tools.formats import open_any
from checkpoints_tools.layout import Options
from checkpoints_tools.megatron_dist import open_megatron, recognises
from checkpoints_tools.megatron_write import lay_out
from megalemur.checkpoint.errors import CheckpointError, DamagedCheckpoint
from megalemur.parallel.boxes import whole
from tests.support.tiny import write_llama
from tests.support.weights import read_all, same_tensors

BRIDGE = """
model:
  _target_: megatron.bridge.models.llama.llama_provider.LlamaModelProvider
  activation_func: {_target_: torch.nn.functional.silu, _call_: false}
  add_bias_linear: false
  ffn_hidden_size: 96
  gated_linear_unit: true
  hidden_size: 64
  kv_channels: 8
  layernorm_epsilon: 1.0e-05
  normalization: RMSNorm
  num_attention_heads: 8
  num_layers: 2
  num_query_groups: 4
  position_embedding_type: rope
  rope_scaling: false
  rotary_base: 10000
  seq_length: 128
  share_embeddings_and_output_weights: false
  vocab_size: 251
train: {train_iters: 10}
"""
FC2 = "decoder.layers.mlp.linear_fc2.weight"


def small(directory, **changes):
    return write_llama(directory, **{"num_layers": 2, **changes})


def to_megatron(hf, destination, dtype=None, **options):
    source = open_any(hf)
    weights = source if dtype is None else Cast(source, dtype)
    convert(weights, source, Request(destination, "megatron", Options(pad_vocab_to=16, **options)))
    return destination


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    return to_megatron(small(root / "hf"), root / "megatron")


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy") / "release"


def change(copy, key, edit):
    """Rewrite one tensor's entry of .metadata."""
    metadata = read_dcp_metadata(copy / ".metadata")
    tensors = dict(metadata.tensors)
    tensors[key] = edit(tensors.get(key))
    (copy / ".metadata").write_bytes(dump_dcp_metadata(metadata._replace(tensors=tensors)))


def with_chunk(number, **changes):
    def edit(tensor):
        chunks = list(tensor.chunks)
        chunks[number] = chunks[number]._replace(**changes)
        return tensor._replace(chunks=tuple(chunks))

    return edit


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ({}, torch.float32),
        ({"num_query_groups": 8}, torch.float16),
        ({"tie_embeddings": True, "vocab_size": 301}, torch.bfloat16),
        ({"num_query_groups": 1, "vocab_size": 16}, torch.bfloat16),
    ],
    ids=["gqa", "mha fp16", "tied odd bf16", "one group, no padding"],
)
def test_what_is_written_is_read_again(tmp_path, shape, dtype):
    hf = small(tmp_path / "hf", dtype=dtype, **shape)
    destination = to_megatron(hf, tmp_path / "megatron")
    assert recognises(destination)
    assert recognises(destination / "release")
    opened = open_megatron(destination)
    assert opened.model == open_any(hf).model
    assert opened.notes == ()
    assert same_tensors(read_all(opened), load_file(hf / "model.safetensors"))


def test_another_dtype_is_cast_to(tmp_path):
    hf = small(tmp_path / "hf")
    opened = open_megatron(to_megatron(hf, tmp_path / "megatron", dtype=torch.bfloat16))
    wanted = {name: weight.bfloat16() for name, weight in load_file(hf / "model.safetensors").items()}
    assert same_tensors(read_all(opened), wanted)


def test_rows_of_the_vocabulary_behind_the_last_token_are_zero(tmp_path):
    hf = small(tmp_path / "hf", vocab_size=250)
    destination = to_megatron(hf, tmp_path / "megatron", tensor=2)
    model = open_any(hf).model.model_copy(update={"vocab_size": 256})
    embedding = read_all(open_megatron(destination, model))["model.embed_tokens.weight"]
    assert torch.equal(embedding[:250], load_file(hf / "model.safetensors")["model.embed_tokens.weight"])
    assert not embedding[250:].any()


def test_every_archive_is_a_whole_zip_file_with_its_crcs(tmp_path):
    release = to_megatron(small(tmp_path / "hf"), tmp_path / "megatron", tensor=2) / "release"
    metadata = read_dcp_metadata(release / ".metadata")
    places = {(chunk.file, chunk.first, chunk.length) for t in metadata.tensors.values() for chunk in t.chunks}
    places |= set(metadata.objects.values())
    assert len(places) == 2 * 7 + 3 + 1  # fc1 is two archives, the extra states are one for all
    for file, first, length in places:
        data = (release / file).read_bytes()[first : first + length]
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    covered = sorted(places)
    assert all(a[1] + a[2] == b[1] for a, b in itertools.pairwise(covered) if a[0] == b[0])


def global_tensors(weights, *, groups, layers=2):
    """megatron-core's tensors as its layers define them, layers stacked."""
    found = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "output_layer.weight": weights["lm_head.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
    }
    stacks = {}
    for layer in range(layers):
        get = {name.removeprefix(f"model.layers.{layer}."): weight for name, weight in weights.items()}.__getitem__
        q, k, v = (get(f"self_attn.{part}_proj.weight").unflatten(0, (groups, -1)) for part in "qkv")
        parts = {
            "self_attention.linear_qkv.layer_norm_weight": get("input_layernorm.weight"),
            "self_attention.linear_qkv.weight": torch.cat([q, k, v], dim=1).flatten(0, 1),
            "self_attention.linear_proj.weight": get("self_attn.o_proj.weight"),
            "mlp.linear_fc1.layer_norm_weight": get("post_attention_layernorm.weight"),
            "mlp.linear_fc1.weight": torch.cat([get("mlp.gate_proj.weight"), get("mlp.up_proj.weight")]),
            "mlp.linear_fc2.weight": get("mlp.down_proj.weight"),
        }
        for name, tensor in parts.items():
            stacks.setdefault(f"decoder.layers.{name}", []).append(tensor)
    return found | {name: torch.stack(tensors) for name, tensors in stacks.items()}


def saved_flat(tensor, shards, file, data):
    """The entry of a tensor that was saved as a grid of flat shards, each in two ranges; archives go behind `data`."""
    shape = [extent // count for extent, count in zip(tensor.shape, shards, strict=True)]
    elements, chunks = torch.Size(shape).numel(), []
    for index in itertools.product(*map(range, shards)):
        starts = [number * extent for number, extent in zip(index, shape, strict=True)]
        part = tensor[whole(shape).moved(starts).slices].reshape(-1)
        for first, last in ((0, elements // 3), (elements // 3, elements)):
            archive = io.BytesIO()
            torch.save(part[first:last].clone().view(*(1 for _ in shards), -1), archive)
            sizes = (*(1 for _ in shards), last - first)
            chunks.append(DcpChunk((*index, first), sizes, file, len(data), len(archive.getvalue())))
            data += archive.getvalue()
    return DcpTensor((*shards, elements), tensor.dtype, tuple(chunks))


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_flat_ranges_of_an_old_distributed_optimizer_are_read(tmp_path, tensor_parallel):
    hf = small(tmp_path / "hf", vocab_size=256)
    release = to_megatron(hf, tmp_path / "megatron") / "release"
    weights, t = load_file(hf / "model.safetensors"), tensor_parallel
    grids = {"linear_qkv.weight": (2, t, 1), "linear_proj.weight": (2, 1, t), "linear_fc2.weight": (2, 1, t)}
    grids |= {"linear_fc1.weight": (2, 2 * t, 1), "layer_norm_weight": (2, 1), "final_layernorm.weight": (1,)}
    grids |= {"embeddings.weight": (t, 1), "output_layer.weight": (t, 1)}
    metadata, data = read_dcp_metadata(release / ".metadata"), bytearray()
    tensors = dict(metadata.tensors)
    for key, tensor in global_tensors(weights, groups=4).items():
        (grid,) = [grid for end, grid in grids.items() if key.endswith(end)]
        tensors[f"optimizer.state.exp_avg.{key}"] = saved_flat(tensor, grid, "__9_0.distcp", data)
    (release / "__9_0.distcp").write_bytes(data)
    (release / ".metadata").write_bytes(dump_dcp_metadata(metadata._replace(tensors=tensors)))
    assert same_tensors(read_all(open_megatron(release), "exp_avg"), weights)


def test_a_grid_that_does_not_divide_its_tensor_is_named(copy):
    flat = DcpTensor((3, 1, 1, 4096), torch.float32, (DcpChunk((0, 0, 0, 0), (1, 1, 1, 1), "__0_0.distcp", 0, 1),))
    first = read_dcp_metadata(copy / ".metadata").tensors[FC2].chunks[0]
    flat = flat._replace(chunks=(first._replace(offsets=(0, 0, 0, 0), sizes=(1, *first.sizes)),))
    change(copy, f"optimizer.state.exp_avg.{FC2}", lambda _: flat)
    with pytest.raises(CheckpointError, match=r"grid of flat shards|lies outside"):
        open_megatron(copy)


def test_a_missing_file_is_named(copy):
    (copy / "__0_1.distcp").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"__0_1.distcp"):
        open_megatron(copy)


def test_a_file_that_was_cut_short_is_named(copy):
    file = copy / "__0_2.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedCheckpoint, match=r"__0_2.distcp"):
        open_megatron(copy)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (with_chunk(1, first=10**12), "__0_2.distcp"),
        (with_chunk(1, length=10**12), "__0_2.distcp"),
        (with_chunk(1, first=-1), r"\.metadata: .*__0_2\.distcp"),
        (with_chunk(1, file="../__0_2.distcp"), "no file of this directory"),
        (with_chunk(1, file="/etc/passwd"), "no file of this directory"),
        (
            with_chunk(1, offsets=(0, 0, 0)),
            r"linear_fc2.weight: it has two chunks at \(0, 0, 0\)",
        ),
        (with_chunk(1, offsets=(2, 0, 0)), "lies outside"),
        (with_chunk(1, sizes=(1, 64, 95)), r"float32 \[1, 64, 96\].*where"),
        (lambda tensor: tensor._replace(chunks=tensor.chunks[:1]), r"layers.1.mlp.down_proj.*missing"),
        (lambda tensor: tensor._replace(dtype=torch.bfloat16), "where .metadata says torch.bfloat16"),
        (lambda tensor: tensor._replace(size=(3, 64, 96)), r"has shape \[3, 64, 96\], the model wants \[2, 64, 96\]"),
    ],
)
def test_a_wrong_entry_is_named(copy, edit, said):
    change(copy, FC2, edit)
    with pytest.raises(CheckpointError, match=said):
        open_megatron(copy)


@pytest.mark.parametrize(
    "key", ["decoder.layers.mlp.router.weight", "decoder.layers.7.mlp.linear_fc2.weight", "vision.patch.weight"]
)
def test_a_tensor_that_no_llama_has_is_named(copy, key):
    found = read_dcp_metadata(copy / ".metadata").tensors[FC2]
    if ".7." in key:
        one = found.chunks[0]
        add = lambda _: DcpTensor((64, 96), torch.float32, (one._replace(offsets=(0, 0), sizes=(64, 96)),))  # noqa: E731
    else:
        add = lambda _: found  # noqa: E731
    change(copy, key, add)
    with pytest.raises(CheckpointError, match=r"no Llama of this shape has it|where .metadata says"):
        open_megatron(copy)


def test_a_missing_tensor_is_named(copy):
    metadata = read_dcp_metadata(copy / ".metadata")
    tensors = {key: tensor for key, tensor in metadata.tensors.items() if key != FC2}
    (copy / ".metadata").write_bytes(dump_dcp_metadata(metadata._replace(tensors=tensors)))
    with pytest.raises(ConversionError, match=r"layers.0.mlp.down_proj.weight \(weight\) is missing"):
        open_megatron(copy)


def test_state_of_one_tensor_alone_is_named_as_incomplete(copy):
    found = read_dcp_metadata(copy / ".metadata").tensors[FC2]
    change(copy, f"optimizer.state.exp_avg_sq.{FC2}", lambda _: found)
    with pytest.raises(ConversionError, match=r"q_proj.weight \(exp_avg_sq\) is missing"):
        open_megatron(copy)


def test_state_of_another_optimizer_is_left_and_said(copy):
    found = read_dcp_metadata(copy / ".metadata").tensors[FC2]
    change(copy, f"optimizer.state.momentum_buffer.{FC2}", lambda _: found)
    opened = open_megatron(copy)
    assert {key.kind for key in opened.dtypes} == {"weight"}
    assert "momentum_buffer" in opened.notes[0]


@pytest.mark.parametrize("file", [".metadata", "common.pt", "metadata.json"])
@pytest.mark.parametrize("data", [b"", b"\x80\x02}q\x00", b"PK\x03\x04 and no more"])
def test_a_small_file_of_other_bytes_is_named(copy, file, data):
    (copy / file).write_bytes(data)
    with pytest.raises(CheckpointError, match=file):
        open_megatron(copy)


def test_another_backend_is_named(copy):
    (copy / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    with pytest.raises(ConversionError, match="'zarr'"):
        open_megatron(copy)


def test_a_checkpoint_that_does_not_say_its_model_takes_it_from_the_caller(copy, written):
    model = open_megatron(written).model
    (copy / "common.pt").write_bytes(dump_archive({"iteration": 3}))
    with pytest.raises(ConversionError, match=r"rotary base.*--hf-config"):
        open_megatron(copy)
    assert open_megatron(copy, model).model == model


def test_bridges_run_config_says_the_model(copy, written):
    (copy / "common.pt").write_bytes(dump_archive({"iteration": 3}))
    (copy / "run_config.yaml").write_text(BRIDGE)
    assert open_megatron(copy).model == open_megatron(written).model
    (copy / "run_config.yaml").write_text(BRIDGE + "twice: &one {a: 1}\nagain: *one\n")
    with pytest.raises(ConversionError, match=r"run_config.yaml.*--hf-config"):
        open_megatron(copy)


def test_other_directories_are_not_recognised(tmp_path, written):
    assert not recognises(tmp_path)
    assert not recognises(tmp_path / "nowhere")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    assert not recognises(tmp_path)
    with pytest.raises(ConversionError, match="neither a number nor 'release'"):
        open_megatron(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert not recognises(tmp_path)
    with pytest.raises(ConversionError, match="no torch_dist checkpoint"):
        open_megatron(tmp_path)


def test_parts_of_one_tensor_in_two_dtypes_are_refused(tmp_path):
    opened = open_any(small(tmp_path / "hf"))
    weights = Mixed(opened, "model.layers.1.self_attn.k_proj.weight")
    with pytest.raises(ConversionError, match=r"k_proj.weight is torch.float16.*--dtype"):
        lay_out(weights, opened, Options())
    with pytest.raises(ConversionError, match=r"one layer.*--dtype"):
        lay_out(Mixed(opened, "model.layers.1.mlp.down_proj.weight"), opened, Options())
    assert lay_out(Cast(weights, torch.bfloat16), opened, Options()).regions


class Mixed:
    """Weights of which one has another dtype."""

    def __init__(self, opened, name):
        self.model = opened.model
        self.dtypes = {key: torch.float16 if key.name == name else dtype for key, dtype in opened.dtypes.items()}
