"""Checkpoints of ours that somebody else made or changed, with digests that fit: refused with a typed error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalemur.checkpoint.directory import open_manifest, verify_checkpoint
from megalemur.checkpoint.errors import CheckpointError, DamagedCheckpoint, NoGoodCheckpoint
from megalemur.checkpoint.load import load_pieces
from megalemur.checkpoint.opening import open_checkpoint
from megalemur.checkpoint.read import CheckpointReader, HuggingFaceReader
from megalemur.checkpoint.save import save_checkpoint
from megalemur.checkpoint.search import Search
from megalemur.parallel.state import MASTER, whole
from tests.support.malice import (
    SPECIAL,
    nested,
    patience,
    pickle_of,
    replace_by,
    safetensors,
    sparse,
    torch_file_of,
    with_digest,
)
from tests.unit.checkpoint.synthetic import SHAPES, contents, whole_pieces

RANK = "trainer/rank-00000.safetensors"
NAME, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "run", contents(whole_pieces()), group=None, max_file_bytes=1 << 30)


def refused(path: Path, canary: Path) -> None:
    """By whoever looks for a checkpoint to resume, and by whoever names it."""
    with patience(), pytest.raises(CheckpointError):
        reader = Search(path.parent).next()
        assert reader is not None
        load_pieces(reader, whole_pieces(filled=False), shapes=SHAPES)
    with patience(), pytest.raises(CheckpointError):
        reader = CheckpointReader(path)
        assert reader.state is not None
        load_pieces(reader, whole_pieces(filled=False), shapes=SHAPES)
    assert not canary.exists()


def test_the_same_readers_load_a_good_one(good: Path) -> None:
    reader = Search(good.parent).next()
    assert reader is not None and reader.state == {"step": 5, "loss": 0.1}
    load_pieces(reader, whole_pieces(filled=False), shapes=SHAPES)


def boxes(change: Callable[[list[Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """A change of the stored boxes of one tensor: each is [box, file, offset]."""

    def apply(body: dict[str, Any]) -> None:
        found = body["trainer"]["state"][MASTER][NAME]
        body["trainer"]["state"][MASTER][NAME] = change(found) or found

    return apply


def place(number: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return boxes(lambda found: found[0].__setitem__(number, value))


def file_entry(path: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    def apply(body: dict[str, Any]) -> None:
        part = body["trainer" if path.startswith("trainer/") else "weights"]["files"]
        part[path] = {
            **part.get(path, {"bytes": 0, "root": "99aa06d3014798d86001c324468d497f", "chunks": []}),
            **values,
        }

    return apply


def top(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body.update(values)


MANIFESTS = {
    "file above": file_entry("../../canary"),
    "file above, through the trainer": file_entry("trainer/../../../canary"),
    "absolute file": file_entry("/etc/passwd"),
    "backslash": file_entry("..\\canary"),
    "NUL": file_entry("config.json\0"),
    "two spellings": file_entry("./config.json"),
    "the manifest itself": file_entry("manifest.json"),
    "very long name": file_entry("a" * 1000),
    "file that is not there": file_entry("more.json"),
    "negative size": file_entry("config.json", bytes=-1),
    "huge size": file_entry("config.json", bytes=10**30),
    "size of text": file_entry("config.json", bytes="23"),
    "size with a fraction": file_entry("config.json", bytes=23.0),
    "size true": file_entry("config.json", bytes=True),
    "digest of text": file_entry("config.json", chunks=["x"]),
    "digest of a list": file_entry("config.json", chunks=[[]]),
    "digests of text": file_entry("config.json", chunks="00000000000000000000000000000000"),
    "too many digests": file_entry("config.json", chunks=["0" * 32] * 2),
    "wrong root": file_entry("config.json", root="0" * 32),
    "offset below": place(2, -4),
    "offset beyond": place(2, 10**6),
    "huge offset": place(2, 10**30),
    "offset between elements": place(2, 1001),
    "offset of text": place(2, "0"),
    "offset with a fraction": place(2, 8.0),
    "offset of another tensor": lambda body: place(2, body["trainer"]["state"][MASTER][EMBEDDING][0][2])(body),
    "place in a weight file": place(1, "model.safetensors"),
    "place above": place(1, "trainer/../../x"),
    "place of a list": place(1, [RANK]),
    "box of text": place(0, "all"),
    "box of 10,000 dimensions": place(0, ",".join(["0:1"] * 10_000)),
    "box beyond": place(0, "0:9"),
    "box backwards": place(0, "8:0"),
    "empty box": place(0, "0:0"),
    "huge box": place(0, "0:999999999999999999"),
    "other digits": place(0, "0:٨"),
    "box twice": boxes(lambda found: found * 2),
    "no box": boxes(lambda found: found.clear()),
    "boxes of an object": boxes(lambda found: {"0:8": found}),
    "two numbers for three": boxes(lambda found: [found[0][:2]]),
    "unknown kind": lambda body: body["trainer"]["state"].update(gradients=body["trainer"]["state"][MASTER]),
    "shape of text": lambda body: body["weights"]["shapes"].update({NAME: "8"}),
    "negative shape": lambda body: body["weights"]["shapes"].update({NAME: [-8]}),
    "no shape": lambda body: body["weights"]["shapes"].update({NAME: []}),
    "huge shape": lambda body: body["weights"]["shapes"].update({NAME: [10**30]}),
    "name that leaves": lambda body: body["weights"]["shapes"].update({"../../canary": [8]}),
    "another step": top(step=6),
    "negative step": top(step=-5),
    "step of text": top(step="5"),
    "step true": top(step=True),
    "other chunks": top(chunk_bytes=1),
    "no chunks": top(chunk_bytes=0),
    "another version": top(version=2),
    "version true": top(version=True),
    "another format": top(format="pickle"),
    "record of a list": top(record=[]),
    "more than the format has": top(code="import os"),
    "weights of a list": top(weights=[]),
    "trainer of nothing": top(trainer=None),
    "dropped, and there": lambda body: body["trainer"].update(dropped="0" * 32),
    "dropped of a list": top(trainer={"dropped": ["0" * 32]}),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_with_a_good_digest_is_refused(what: str, good: Path, tmp_path: Path) -> None:
    body = json.loads((good / "manifest.json").read_bytes())
    MANIFESTS[what](body)
    (good / "manifest.json").write_bytes(with_digest(body))
    if what == "another step":  # believed under its own name
        with pytest.raises(NoGoodCheckpoint, match="the directory was renamed"):
            Search(good.parent).next()
    elif what == "offset of another tensor":
        with pytest.raises(DamagedCheckpoint, match="behind the first of"):
            open_manifest(good)
    else:
        refused(good, tmp_path / "canary")


BYTES = {
    "pickle": lambda canary: pickle_of(canary),
    "torch file": lambda canary: torch_file_of(canary),
    "weights": lambda canary: safetensors({"a": {}}),
    "empty": lambda _: b"",
    "a list": lambda _: b"[]",
    "nested deeply": lambda _: nested(),
    "objects nested deeply": lambda _: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "NaN": lambda _: b'{"format": "megalemur", "step": NaN}',
    "infinity": lambda _: b'{"format": "megalemur", "step": 1e999}',
    "5,000 digits": lambda _: b'{"format": "megalemur", "step": ' + b"9" * 5000 + b"}",
    "a key twice": lambda _: b'{"format": "megalemur", "format": "megalemur"}',
    "half a letter": lambda _: rb'{"format": "\ud800"}',
    "not UTF-8": lambda _: b'{"format": "\xff"}',
    "UTF-16": lambda _: '{"format": "megalemur"}'.encode("utf-16"),
    "byte order mark": lambda _: b"\xef\xbb\xbf{}",
}


@pytest.mark.parametrize("what", BYTES)
@pytest.mark.parametrize("name", ["manifest.json", "trainer/state.json", RANK, "model.safetensors"])
def test_bytes_of_another_kind_are_refused(what: str, name: str, good: Path, tmp_path: Path) -> None:
    (good / name).write_bytes(BYTES[what](tmp_path / "canary"))
    refused(good, tmp_path / "canary")


@pytest.mark.parametrize("what", BYTES)
def test_a_state_file_is_refused_though_its_digest_fits(what: str, good: Path, tmp_path: Path) -> None:
    from megalemur.checkpoint.digests import entry_of

    data = BYTES[what](tmp_path / "canary")
    (good / "trainer" / "state.json").write_bytes(data)
    body = json.loads((good / "manifest.json").read_bytes())
    entry = entry_of(data)
    body["trainer"]["files"]["trainer/state.json"] = {
        "bytes": entry.size,
        "root": entry.root,
        "chunks": list(entry.chunks),
    }
    (good / "manifest.json").write_bytes(with_digest(body))
    if what in ("a list", "weights"):
        return  # JSON, or as long as a header: what a run makes of it is another test
    with patience(), pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        _ = CheckpointReader(good).state
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["manifest.json", "trainer/state.json", RANK, "model.safetensors", "config.json"])
@pytest.mark.parametrize("what", SPECIAL)
def test_what_is_no_plain_file_is_refused(what: str, name: str, good: Path, tmp_path: Path) -> None:
    replace_by(good / name, what)
    refused(good, tmp_path / "canary")


@pytest.mark.parametrize("name", ["manifest.json", RANK])
def test_a_large_file_of_nothing_is_refused(name: str, good: Path, tmp_path: Path) -> None:
    sparse(good / name, 1 << 40)
    refused(good, tmp_path / "canary")


@pytest.mark.parametrize("name", [RANK, "model.safetensors", "manifest.json", "trainer"])
def test_a_link_to_a_good_file_or_folder_is_refused(name: str, good: Path, tmp_path: Path) -> None:
    (good / name).rename(tmp_path / "elsewhere")
    (good / name).symlink_to(tmp_path / "elsewhere")
    refused(good, tmp_path / "canary")


def test_a_link_to_a_checkpoint_is_not_resumed(good: Path, tmp_path: Path) -> None:
    good.rename(tmp_path / "elsewhere")
    good.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NoGoodCheckpoint, match="is a link"):
        Search(good.parent).next()


def test_a_weight_file_that_the_manifest_does_not_list_is_not_read(good: Path) -> None:
    shutil.copy(good / "model.safetensors", good / "model-2.safetensors")
    (good / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(SHAPES, "model-2.safetensors")})
    )
    (good / "model.safetensors").rename(good / "x")
    with pytest.raises(DamagedCheckpoint):
        HuggingFaceReader(good)


def test_no_byte_of_a_checkpoint_is_used_uncompared(good: Path) -> None:
    """Flip a bit anywhere: whoever asks for what lies there is refused."""
    for name in (RANK, "model.safetensors", "config.json"):
        data = (good / name).read_bytes()
        (good / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(DamagedCheckpoint):
            if name == "config.json":
                open_checkpoint(good).file(name)
            elif name == RANK:
                CheckpointReader(good).read(NAME, MASTER, whole(SHAPES[NAME]))
            else:
                HuggingFaceReader(good).read(NAME, MASTER, whole(SHAPES[NAME]))
        (good / name).write_bytes(data)
    verify_checkpoint(good)
