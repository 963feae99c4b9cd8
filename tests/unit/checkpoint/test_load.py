"""Loading: any box from any splitting, Hugging Face directories, and everything that must be refused."""

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megalemur.checkpoint import digests
from megalemur.checkpoint.errors import CheckpointError, DamagedCheckpoint
from megalemur.checkpoint.load import load_pieces
from megalemur.checkpoint.read import CheckpointReader, HuggingFaceReader
from megalemur.checkpoint.save import save_checkpoint
from megalemur.parallel.state import MASTER, Owned, Piece, Segment, pieces_of, whole
from tests.support.chunks import use_chunks_of
from tests.unit.checkpoint.synthetic import (
    SHAPES,
    assert_loaded,
    contents,
    full_state,
    pieces_at,
    random_split,
    whole_pieces,
)

CUTS = st.lists(st.tuples(*[st.integers(0, 30)] * 4), max_size=4)


def save(root: Path, pieces: list[Piece]) -> Path:
    return save_checkpoint(root, contents(pieces), group=None, max_file_bytes=1 << 30)


@pytest.fixture(scope="module", autouse=True)
def chunks_of_this_size() -> Iterator[None]:
    """Chunks may be made smaller in a test of this file."""
    before = digests.CHUNK_BYTES
    yield
    use_chunks_of(before)


@settings(deadline=None, max_examples=25)
@given(CUTS, CUTS, st.sampled_from([8, 24, 256, 1 << 20]))
def test_any_splitting_is_read_from_any_other(
    written: list[tuple[int, int, int, int]], read: list[tuple[int, int, int, int]], chunk: int
) -> None:
    use_chunks_of(chunk)

    def split(cuts: list[tuple[int, int, int, int]], filled: bool) -> list[Piece]:
        boxes = [(name, box) for name, shape in SHAPES.items() for box in random_split(shape, cuts)]
        return pieces_at(boxes, filled=filled)

    with TemporaryDirectory() as root:
        path, loaded = save(Path(root), split(written, True)), split(read, False)
        load_pieces(CheckpointReader(path), loaded, shapes=SHAPES)
        assert_loaded(loaded)


@given(st.integers(0, 192), st.integers(0, 192))
@settings(deadline=None, max_examples=15)
def test_flat_shards_with_partial_rows_are_read_back(one: int, other: int) -> None:
    name, shape = "model.embed_tokens.weight", SHAPES["model.embed_tokens.weight"]
    state, cuts = full_state(), [0, *sorted((one, other)), 192]
    parameter = torch.nn.Parameter(torch.zeros(shape))
    shards = [Owned(parameter, a, b, {MASTER: state[name, MASTER].view(-1)[a:b].clone()}) for a, b in pairwise(cuts)]
    pieces = pieces_of(shards, {parameter: [Segment(name, shape, whole(shape), 0)]})
    others = [p for p in whole_pieces(kinds=[MASTER]) if p.name != name]
    with TemporaryDirectory() as root:
        path, loaded = save(Path(root), [*pieces, *others]), whole_pieces(filled=False, kinds=[MASTER])
        load_pieces(CheckpointReader(path), loaded, shapes=SHAPES)
        assert_loaded(loaded)


def hugging_face(directory: Path, dtype: torch.dtype = torch.float16, shards: int = 1) -> dict[str, torch.Tensor]:
    """A Hugging Face directory, written by safetensors itself."""
    directory.mkdir(exist_ok=True)
    weights = {name: full_state()[name, MASTER].to(dtype) for name in SHAPES}
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return weights
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(weights)}
    for file in names:
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, directory / file)
    write_index(directory, weight_map)
    return weights


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_masters_are_the_source_files_own_values(dtype: torch.dtype, shards: int, tmp_path: Path) -> None:
    weights = hugging_face(tmp_path, dtype, shards)
    reader, loaded = HuggingFaceReader(tmp_path), whole_pieces(filled=False, kinds=[MASTER])
    load_pieces(reader, loaded, shapes=SHAPES)
    assert all(torch.equal(piece.tensor, weights[piece.name].float()) for piece in loaded)
    assert reader.dtypes == dict.fromkeys(SHAPES, dtype) and reader.shapes == SHAPES


def test_a_hugging_face_directory_goes_through_bit_by_bit(tmp_path: Path) -> None:
    weights = hugging_face(tmp_path / "source", torch.float16, shards=2)
    reader, pieces = HuggingFaceReader(tmp_path / "source"), whole_pieces(filled=False, kinds=[MASTER])
    load_pieces(reader, pieces, shapes=SHAPES)
    path = save_checkpoint(tmp_path, contents(pieces, dtypes=reader.dtypes), group=None, max_file_bytes=300)
    again = HuggingFaceReader(path)
    for name, shape in SHAPES.items():
        assert torch.equal(again.read(name, MASTER, whole(shape)), weights[name].float())
    assert again.dtypes == reader.dtypes


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    hugging_face(tmp_path / "blobs", shards=2)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert HuggingFaceReader(tmp_path / "snapshot").shapes == SHAPES


def test_buffers_that_no_model_loads_are_passed_over_when_named(tmp_path: Path) -> None:
    weights = hugging_face(tmp_path)
    save_file({**weights, "rotary.inv_freq": torch.ones(3)}, tmp_path / "model.safetensors")
    pieces = whole_pieces(filled=False, kinds=[MASTER])
    load_pieces(HuggingFaceReader(tmp_path, derived=r".*\.inv_freq"), pieces, shapes=SHAPES)
    with pytest.raises(CheckpointError, match=r"rotary\.inv_freq in model\.safetensors is no tensor of the model"):
        load_pieces(HuggingFaceReader(tmp_path), pieces, shapes=SHAPES)


def test_every_misfit_is_listed_with_its_file_and_nothing_is_read(tmp_path: Path) -> None:
    weights = hugging_face(tmp_path)
    del weights["model.norm.weight"]
    weights["model.embed_tokens.weight"] = torch.zeros(24, 9)
    weights["model.layers.0.input_layernorm.weight"] = torch.zeros(8, dtype=torch.int8)
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(8)
    save_file(weights, tmp_path / "model.safetensors")
    # this rank holds a good tensor only, and hears of all the others
    pieces = pieces_at([("model.layers.0.mlp.up_proj.weight", whole((12, 8)))], filled=False, kinds=[MASTER])
    with pytest.raises(CheckpointError) as caught:
        load_pieces(HuggingFaceReader(tmp_path), pieces, shapes=SHAPES)
    message = str(caught.value)
    assert "model.norm.weight is missing" in message
    assert "model.embed_tokens.weight in model.safetensors has shape [24, 9], the model wants [24, 8]" in message
    assert "model.layers.0.input_layernorm.weight in model.safetensors has dtype I8" in message
    assert "model.layers.0.self_attn.q_proj.bias in model.safetensors is no tensor of the model" in message
    assert torch.isnan(pieces[0].tensor).all()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, whole_pieces())
    other = {**{n: s for n, s in SHAPES.items() if n != "model.norm.weight"}, "lm_head.weight": (24, 8)}
    with pytest.raises(CheckpointError) as caught:
        load_pieces(CheckpointReader(path), [], shapes=other)
    assert "lm_head.weight is missing" in str(caught.value) and "model.norm.weight" in str(caught.value)


def test_a_piece_of_another_shape_than_the_model_is_refused(tmp_path: Path) -> None:
    reader = CheckpointReader(save(tmp_path, whole_pieces()))
    wrong = Piece("model.norm.weight", MASTER, (9,), whole((9,)), torch.zeros(9))
    with pytest.raises(CheckpointError, match="does not fit the model's shape"):
        load_pieces(reader, [wrong], shapes=SHAPES)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="convert it to safetensors"):
        HuggingFaceReader(tmp_path)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("../model.safetensors", "no plain file name"),
        ("/etc/passwd", "no plain file name"),
        ("sub/model.safetensors", "no plain file name"),
        ("pytorch_model-00001-of-00002.bin", "no safetensors file"),
        ("model-00009-of-00009.safetensors", "not there: model-00009-of-00009.safetensors"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(file: str, said: str, tmp_path: Path) -> None:
    write_index(tmp_path, {"model.norm.weight": file})
    with pytest.raises(DamagedCheckpoint, match=said):
        HuggingFaceReader(tmp_path)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    hugging_face(tmp_path, shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(tmp_path, {**index, "lm_head.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(DamagedCheckpoint, match=r"model-00001-of-00002\.safetensors: holds other .*lm_head\.weight"):
        HuggingFaceReader(tmp_path)


def test_a_shard_cut_short_is_named(tmp_path: Path) -> None:
    hugging_face(tmp_path, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(DamagedCheckpoint, match=r"model-00002-of-00002\.safetensors: is no complete safetensors file"):
        HuggingFaceReader(tmp_path)


def test_two_sets_of_weights_are_ambiguous(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    hugging_face(tmp_path, shards=2)
    with pytest.raises(CheckpointError, match="remove the one that is not meant"):
        HuggingFaceReader(tmp_path)


def test_a_rank_file_that_contradicts_the_manifest_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, whole_pieces())
    file = path / "trainer" / "rank-00000.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'model.norm.weight|master|0:8"', b'model.norm.weight|master|0:9"'))
    with pytest.raises(DamagedCheckpoint, match=r"rank-00000\.safetensors"):
        load_pieces(CheckpointReader(path), whole_pieces(filled=False), shapes=SHAPES)


def test_a_changed_small_file_is_not_handed_out(tmp_path: Path) -> None:
    path = save(tmp_path, whole_pieces())
    (path / "trainer" / "state.json").write_bytes((path / "trainer" / "state.json").read_bytes().replace(b"5", b"6"))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        _ = CheckpointReader(path).state
