"""Which checkpoints are believed, and which may go."""

import os
from pathlib import Path

import pytest

from megalemur.checkpoint.directory import newest_checkpoint, prune, verify_checkpoint
from megalemur.checkpoint.errors import DamagedCheckpoint, NoGoodCheckpoint
from megalemur.checkpoint.save import save_checkpoint
from tests.unit.checkpoint.synthetic import contents, whole_pieces


def save(root: Path, *steps: int) -> list[Path]:
    pieces = whole_pieces()
    return [save_checkpoint(root, contents(pieces, n), group=None, max_file_bytes=1 << 30) for n in steps]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def test_a_directory_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path).path is None
    assert newest_checkpoint(tmp_path / "nowhere").path is None


def test_newest_is_by_step_and_not_by_time_or_name(tmp_path: Path) -> None:
    save(tmp_path, 1000000, 999999, 7)
    assert newest_checkpoint(tmp_path).path == tmp_path / "step_1000000"


def test_an_unfinished_save_is_never_believed(tmp_path: Path) -> None:
    (old, new) = save(tmp_path, 1, 2)
    new.rename(tmp_path / "step_000002.tmp-0a1b2c3d")
    assert newest_checkpoint(tmp_path) == (old, ())


def test_damaged_checkpoints_are_passed_over_and_named(tmp_path: Path) -> None:
    _, good, flipped, cut, gone, bare, linked = save(tmp_path, 1, 2, 3, 4, 5, 6, 7)
    flip(flipped / "manifest.json", 200)
    os.truncate(cut / "trainer" / "rank-00000.safetensors", 1000)
    (gone / "model.safetensors").unlink()
    (bare / "manifest.json").unlink()
    (linked / "run.yaml").unlink()
    (linked / "run.yaml").symlink_to(good / "run.yaml")

    path, passed_over = newest_checkpoint(tmp_path)
    assert path == good
    assert [item.path for item in passed_over] == [
        linked / "run.yaml",
        bare / "manifest.json",
        gone / "model.safetensors",
        cut / "trainer" / "rank-00000.safetensors",
        flipped / "manifest.json",
    ]
    assert "has 1000 bytes" in str(passed_over[3])


def test_checkpoints_without_a_good_one_are_an_error_of_its_own(tmp_path: Path) -> None:
    for path in save(tmp_path, 1, 2):
        (path / "config.json").unlink()
    with pytest.raises(NoGoodCheckpoint) as caught:
        newest_checkpoint(tmp_path)
    assert len(caught.value.damaged) == 2
    assert "step_000001/config.json" in str(caught.value) and "step_000002/config.json" in str(caught.value)


def test_verifying_reads_every_byte_of_every_file(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        for position in (0, file.stat().st_size // 2, -1):
            flip(file, position)
            with pytest.raises(DamagedCheckpoint) as caught:
                verify_checkpoint(path)
            assert caught.value.path == file
            flip(file, position)
    assert verify_checkpoint(path).step == 1


def test_pruning_keeps_the_newest_good_ones(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2, 3, 4, 5)
    assert prune(tmp_path, 0) == []
    assert prune(tmp_path, 2) == [paths[2], paths[1], paths[0]]
    assert sorted(tmp_path.iterdir()) == paths[3:]


def test_pruning_counts_no_damaged_checkpoint_as_kept(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2, 3, 4)
    (paths[3] / "run.yaml").unlink()
    assert prune(tmp_path, 2) == [paths[0]]
    assert sorted(tmp_path.iterdir()) == paths[1:]


def test_pruning_leaves_unfinished_saves_alone(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    unfinished = tmp_path / "step_000001.tmp-00000000"
    unfinished.mkdir()
    prune(tmp_path, 1)
    assert unfinished.exists()
