"""The manifest: any change is noticed, and what contradicts itself is refused even when its digest is right."""

from dataclasses import replace
from pathlib import Path

import pytest

from megalemur.checkpoint.digests import FileEntry, entry_of
from megalemur.checkpoint.errors import DamagedCheckpoint
from megalemur.checkpoint.manifest import (
    Manifest,
    Stored,
    box_of_text,
    box_text,
    dump_manifest,
    is_plain_path,
    parse_manifest,
    without_trainer,
)
from megalemur.parallel.boxes import Box

RANK = "trainer/rank-00000.safetensors"
GOOD = Manifest(
    step=7,
    record={"layout": {"tensor": 2}},
    files={RANK: entry_of(bytes(200)), "config.json": entry_of(b"{}")},
    shapes={"w": (4, 6)},
    state={"master": {"w": (Stored(Box((0, 0), (4, 3)), RANK, 96), Stored(Box((0, 3), (4, 6)), RANK, 144))}},
)


def test_a_manifest_comes_back() -> None:
    assert parse_manifest(dump_manifest(GOOD), Path("m")) == GOOD


def test_every_single_changed_byte_is_noticed() -> None:
    data = dump_manifest(GOOD)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(DamagedCheckpoint):
            parse_manifest(bytes(changed), Path("m"))


@pytest.mark.parametrize("keep", [0, 1, 50, -1])
def test_a_manifest_cut_short_is_noticed(keep: int) -> None:
    with pytest.raises(DamagedCheckpoint):
        parse_manifest(dump_manifest(GOOD)[:keep], Path("m"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (replace(GOOD, files={**GOOD.files, "../evil": entry_of(b"x")}), "does not stay inside"),
        (replace(GOOD, files={}), "is not in the list of the trainer's files"),
        (replace(GOOD, files={**GOOD.files, RANK: entry_of(bytes(191))}), r"bytes \[144, 192\) lie outside"),
        (replace(GOOD, files={**GOOD.files, RANK: FileEntry(200, ())}), "0 digests do not fit 200 bytes"),
        (replace(GOOD, files={**GOOD.files, RANK: FileEntry(200, ("00",))}), "1 digests do not fit"),
        (replace(GOOD, state={}, dropped="no"), "no digest of a dropped part"),
        (
            replace(GOOD, state={"master": {"w": (Stored(Box((0, 0), (4, 6)), "config.json", 0),)}}),
            "the trainer's files",
        ),
        (replace(GOOD, shapes={"w": (4, 6), "v": (2,)}), "not there for exactly the tensors"),
        (replace(GOOD, shapes={"w": (4, 5)}), "lies outside shape"),
        (replace(GOOD, shapes={"w": (5, 6)}), "4:5,0:6 is nowhere"),
        (replace(GOOD, state={"master": {"w": (Stored(Box((0, 0), (4, 4)), RANK, 0),) * 2}}), "overlap"),
    ],
)
def test_contradictions_are_refused_although_the_digest_is_right(wrong: Manifest, said: str) -> None:
    with pytest.raises(DamagedCheckpoint, match=said):
        parse_manifest(dump_manifest(wrong), Path("m"))


def test_the_trainers_part_can_be_dropped_and_the_rest_still_verifies() -> None:
    thin = without_trainer(GOOD)
    assert set(thin.files) == {"config.json"} and thin.shapes == GOOD.shapes and not thin.state
    assert parse_manifest(dump_manifest(thin), Path("m")) == thin
    other = replace(GOOD, state={"master": {"w": (Stored(Box((0, 0), (4, 6)), RANK, 0),)}})
    assert without_trainer(other).dropped != thin.dropped


def test_another_version_is_named() -> None:
    data = dump_manifest(GOOD).replace(b'"version":1', b'"version":9')
    with pytest.raises(DamagedCheckpoint, match="format version 9"):
        parse_manifest(data, Path("m"))


@pytest.mark.parametrize("text", ["/etc/passwd", "../a", "a/../../b", "a\\b", "", "a//b", "./a", "a/"])
def test_paths_that_leave_or_have_two_spellings_are_not_plain(text: str) -> None:
    assert not is_plain_path(text)


def test_boxes_have_one_spelling() -> None:
    assert box_text(Box((0, 12), (16, 128))) == "0:16,12:128"
    assert box_of_text("0:16,12:128") == Box((0, 12), (16, 128))
    for wrong in ("", "1", "1:2,", "-1:2", "a:b", "1:2:3", "1:2 "):
        with pytest.raises(ValueError):
            box_of_text(wrong)
