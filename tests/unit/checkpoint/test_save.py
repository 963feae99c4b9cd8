"""Saving in one process: what lies on the disk, what is refused, and that only a rename commits."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megalemur.checkpoint.directory import newest_checkpoint, verify_checkpoint
from megalemur.checkpoint.errors import CheckpointError
from megalemur.checkpoint.load import load_pieces
from megalemur.checkpoint.read import CheckpointReader
from megalemur.checkpoint.save import Contents, save_checkpoint
from megalemur.parallel.state import MASTER, Box, Piece
from tests.unit.checkpoint.synthetic import SHAPES, assert_loaded, contents, full_state, pieces_at, whole_pieces


def save(root: Path, what: Contents, max_file_bytes: int = 1 << 30) -> Path:
    return save_checkpoint(root, what, group=None, max_file_bytes=max_file_bytes)


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path: Path) -> None:
    path = save(tmp_path, contents(whole_pieces()))
    verify_checkpoint(path)
    reader, loaded = CheckpointReader(path), whole_pieces(filled=False)
    load_pieces(reader, loaded, shapes=SHAPES)
    assert_loaded(loaded)
    assert reader.state == {"step": 5, "loss": 0.1}
    assert reader.manifest.record == {"layout": {"tensor": 2}}
    assert reader.file("run.yaml") == b"run: {}\n"


def test_nothing_but_the_checkpoint_is_left_and_all_of_it_is_in_the_manifest(tmp_path: Path) -> None:
    path = save(tmp_path, contents(whole_pieces()))
    assert [p.name for p in tmp_path.iterdir()] == ["step_000005"]
    found = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert found == set(verify_checkpoint(path).files) | {"manifest.json"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_one_hugging_face_file_in_the_export_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    path = save(tmp_path, contents(whole_pieces(), dtypes=dict.fromkeys(SHAPES, dtype)))
    weights, state = load_file(path / "model.safetensors"), full_state()
    assert weights.keys() == SHAPES.keys() and not (path / "model.safetensors.index.json").exists()
    assert all(torch.equal(weights[name], state[name, MASTER].to(dtype)) for name in SHAPES)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_weights_of_mixed_dtypes_are_aligned(tmp_path: Path) -> None:
    shapes = {"half": (3,), "full": (4,)}
    pieces = [Piece(n, MASTER, s, Box((0,), s), torch.arange(float(s[0]))) for n, s in shapes.items()]
    dtypes = {"half": torch.bfloat16, "full": torch.float32}
    path = save(tmp_path, contents(pieces, shapes=shapes, dtypes=dtypes))
    data = (path / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["full"]["data_offsets"] == [0, 16] and header["half"]["data_offsets"] == [16, 22]
    assert load_file(path / "model.safetensors")["full"].tolist() == [0, 1, 2, 3]


def test_weights_are_split_at_the_size_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path, contents(whole_pieces()), max_file_bytes=400)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(2 * torch.Size(shape).numel() for shape in SHAPES.values())
    for file in files:
        weights = load_file(path / file)
        assert all(index["weight_map"][name] == file for name in weights)
        assert sum(t.nbytes for t in weights.values()) <= 400


def test_a_tensor_larger_than_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    path = save(tmp_path, contents(whole_pieces()), max_file_bytes=1)
    assert len(list(path.glob("model-*.safetensors"))) == len(SHAPES)


def test_a_state_before_the_first_step_has_masters_only(tmp_path: Path) -> None:
    path = save(tmp_path, contents(whole_pieces(kinds=[MASTER]), step=0))
    reader = CheckpointReader(path)
    assert reader.kinds == {MASTER}
    with pytest.raises(CheckpointError, match="holds master and no exp_avg, exp_avg_sq"):
        load_pieces(reader, whole_pieces(filled=False), shapes=SHAPES)


def broken(**changes: Any) -> Piece:
    good = whole_pieces()[0]
    return Piece(**{**good.__dict__, **changes})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (contents(whole_pieces()[:-3]), r"model\.norm\.weight \(master\): no rank holds 0:8"),
        (contents(whole_pieces()[:-1]), r"model\.norm\.weight \(exp_avg_sq\): no rank holds 0:8"),
        (contents([*whole_pieces(), broken(name="lm_head.weight")]), "no such tensor"),
        (contents([*whole_pieces(), broken(shape=(24, 9))]), r"the model's tensor has shape \[24, 8\]"),
        (contents([*whole_pieces(), broken(tensor=torch.zeros(24, 8).bfloat16())]), "wants fp32"),
        (contents(whole_pieces(), dtypes={}), "export dtype None"),
        (contents(whole_pieces(), files={"../x": b""}), "plain name"),
        (contents(whole_pieces(), files={"manifest.json": b""}), "plain name"),
        (contents(whole_pieces(), state={"loss": float("nan")}), "not JSON compliant"),
    ],
)
def test_wrong_contents_are_refused_before_anything_is_written(wrong: Contents, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        save(tmp_path / "root", wrong)
    assert not (tmp_path / "root").exists()


def test_masters_beyond_fp16_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    pieces = whole_pieces()
    pieces[0].tensor[3, 3] = 70000.0
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight: values beyond"):
        save(tmp_path, contents(pieces, dtypes=dict.fromkeys(SHAPES, torch.float16)))
    assert list(tmp_path.iterdir()) == []


def test_a_good_checkpoint_of_the_step_makes_room_for_the_state_of_now(tmp_path: Path) -> None:
    path = save(tmp_path, contents(whole_pieces()))
    assert save(tmp_path, contents(whole_pieces(), state={"again": 1})) == path
    assert CheckpointReader(path).state == {"again": 1}
    (replaced,) = tmp_path.glob("step_000005.replaced-*")
    assert verify_checkpoint(replaced).step == 5


def test_a_kill_while_one_makes_room_leaves_one_to_resume_from(tmp_path: Path) -> None:
    path = save(tmp_path, contents(whole_pieces()))
    child = os.fork()
    if child == 0:

        def kill_at(name: str, arguments: Any) -> None:
            if name == "os.rename" and ".tmp-" in str(arguments[0]):
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(kill_at)
            save(tmp_path, contents(whole_pieces(), state={"again": 1}))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not path.exists()
    found = newest_checkpoint(tmp_path).path
    assert found is not None and verify_checkpoint(found).step == 5 and CheckpointReader(found).state["step"] == 5


def test_a_damaged_checkpoint_of_the_step_is_moved_aside(tmp_path: Path) -> None:
    path = save(tmp_path, contents(whole_pieces()))
    os.truncate(path / "model.safetensors", 100)
    assert save(tmp_path, contents(whole_pieces(), state={"again": 1})) == path
    assert CheckpointReader(path).state == {"again": 1}
    assert [p.name.split("-")[0] for p in sorted(tmp_path.iterdir())] == ["step_000005", "step_000005.damaged"]


@pytest.mark.parametrize(
    ("event", "target"),
    [("os.mkdir", "trainer"), ("open", "model.safetensors"), ("open", "manifest.json"), ("os.rename", "step_000005")],
)
def test_a_kill_before_the_rename_leaves_no_checkpoint(event: str, target: str, tmp_path: Path) -> None:
    save(tmp_path, contents(whole_pieces(), step=4))
    child = os.fork()
    if child == 0:

        def kill_at(name: str, arguments: Any) -> None:
            if name == event and "step_000005" in str(arguments[0]) and target in str(arguments[0]):
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(kill_at)
            save(tmp_path, contents(whole_pieces(), step=5))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert newest_checkpoint(tmp_path).path == tmp_path / "step_000004"
    assert not (tmp_path / "step_000005").exists()
    # the next attempt is not disturbed by what was left behind
    assert verify_checkpoint(save(tmp_path, contents(whole_pieces(), step=5))).step == 5


def test_pieces_that_are_views_of_larger_tensors_are_saved_by_value(tmp_path: Path) -> None:
    state = full_state()
    boxes = [Box((0, 0), (24, 3)), Box((0, 3), (24, 8))]
    name = "model.embed_tokens.weight"
    views = [Piece(name, k, (24, 8), box, state[name, k][box.slices]) for box in boxes for k in ("master",)]
    others = [p for p in whole_pieces(kinds=[MASTER]) if p.name != name]
    path = save(tmp_path, contents([*views, *others]))
    loaded = pieces_at([(name, Box((5, 2), (20, 6)))], filled=False, kinds=[MASTER])
    load_pieces(CheckpointReader(path), loaded, shapes=SHAPES)
    assert_loaded(loaded)
