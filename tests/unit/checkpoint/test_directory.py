"""Which checkpoints are believed."""

import os
from pathlib import Path

import pytest

from megalemur.checkpoint.directory import newest_checkpoint, open_manifest, verify_checkpoint
from megalemur.checkpoint.errors import DamagedCheckpoint, NoGoodCheckpoint
from megalemur.checkpoint.manifest import dump_manifest, without_trainer
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


def test_one_that_was_replaced_counts_only_where_nothing_stands_in_its_place(tmp_path: Path) -> None:
    old, new = save(tmp_path, 1, 2)
    replaced = tmp_path / "step_000002.replaced-0a1b2c3d"
    new.rename(replaced)
    assert newest_checkpoint(tmp_path) == (replaced, ())
    save(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == (new, ())
    (new / "run.yaml").unlink()
    assert newest_checkpoint(tmp_path).path == replaced
    (replaced / "run.yaml").unlink()
    assert newest_checkpoint(tmp_path).path == old


def test_weights_alone_are_verified_and_never_resumed_from(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 1, 2)
    (newer / "manifest.json").write_bytes(dump_manifest(without_trainer(open_manifest(newer))))
    assert verify_checkpoint(newer).dropped
    path, passed_over = newest_checkpoint(tmp_path)
    assert path == older and "weights only" in passed_over[0].reason
    (older / "manifest.json").unlink()
    with pytest.raises(NoGoodCheckpoint, match="weights only"):
        newest_checkpoint(tmp_path)
