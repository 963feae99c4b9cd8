"""Weight files and indexes that somebody else made: refused with a typed error, whatever they try."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megalemur.checkpoint.errors import CheckpointError
from megalemur.checkpoint.load import load_pieces
from megalemur.checkpoint.read import HuggingFaceReader
from megalemur.parallel.state import MASTER
from tests.support.malice import (
    SPECIAL,
    entry,
    nested,
    patience,
    pickle_of,
    replace_by,
    safetensors,
    sparse,
    torch_file_of,
)
from tests.unit.checkpoint.synthetic import SHAPES, full_state, whole_pieces

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
HUGE = 10**30


def weights() -> dict[str, torch.Tensor]:
    return {name: full_state()[name, MASTER].half() for name in SHAPES}


def load(directory: Path) -> None:
    pieces = whole_pieces(filled=False, kinds=[MASTER])
    load_pieces(HuggingFaceReader(directory), pieces, shapes=SHAPES)


def refused(directory: Path, canary: Path) -> str:
    with patience(), pytest.raises(CheckpointError) as caught:
        load(directory)
    assert not canary.exists()
    return str(caught.value)


FILES = {
    "pickle in disguise": lambda canary: pickle_of(canary),
    "torch file in disguise": lambda canary: torch_file_of(canary),
    "pickle as a header": lambda canary: safetensors(pickle_of(canary)),
    "pickle behind a good header": lambda canary: safetensors(TWO, bytes(16) + pickle_of(canary)),
    "empty": lambda _: b"",
    "seven bytes": lambda _: bytes(7),
    "no header": lambda _: bytes(8),
    "header of 2**63 bytes": lambda _: safetensors(TWO, bytes(16), length=1 << 63),
    "header of 2**64 - 1 bytes": lambda _: safetensors(TWO, bytes(16), length=(1 << 64) - 1),
    "header beyond the file": lambda _: safetensors(TWO, bytes(16), length=10_000),
    "header cut short": lambda _: safetensors(TWO, bytes(16), length=20),
    "header over the data": lambda _: safetensors(TWO, bytes(16), length=len(json.dumps(TWO)) + 8),
    "header of no object": lambda _: safetensors([TWO]),
    "header not UTF-8": lambda _: safetensors(b'{"\xff": 1}'),
    "header nested deeply": lambda _: safetensors(nested()),
    "NaN in the header": lambda _: safetensors(b'{"a": NaN}'),
    "1e999 in the header": lambda _: safetensors(b'{"a": 1e999}'),
    "a name twice": lambda _: safetensors(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "overlap": lambda _: safetensors({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "the same bytes twice": lambda _: safetensors({"a": entry(), "b": entry()}, bytes(8)),
    "a gap": lambda _: safetensors({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)),
    "beyond the end": lambda _: safetensors({"a": entry(offsets=(0, 8)), "b": entry(offsets=(8, 16))}, bytes(8)),
    "bytes left over": lambda _: safetensors(TWO, bytes(17)),
    "bytes missing": lambda _: safetensors(TWO, bytes(15)),
    "negative offset": lambda _: safetensors({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "offsets backwards": lambda _: safetensors({"a": entry(offsets=(8, 0))}, bytes(8)),
    "huge offset": lambda _: safetensors({"a": entry(offsets=(0, HUGE))}, bytes(8)),
    "offset of 5,000 digits": lambda _: safetensors(b'{"a": {"data_offsets": [0, %s]}}' % (b"9" * 5000)),
    "offset of text": lambda _: safetensors({"a": entry(offsets=("0", "8"))}, bytes(8)),
    "offset with a fraction": lambda _: safetensors({"a": entry(offsets=(0, 8.0))}, bytes(8)),
    "offset true": lambda _: safetensors({"a": entry((1,), (False, True), "U8")}, bytes(1)),
    "three offsets": lambda _: safetensors({"a": entry(offsets=(0, 4, 8))}, bytes(8)),
    "huge shape": lambda _: safetensors({"a": entry((HUGE, HUGE))}, bytes(8)),
    "shape that wraps around": lambda _: safetensors({"a": entry((1 << 32, 1 << 32, 2))}, bytes(8)),
    "negative shape": lambda _: safetensors({"a": entry((-1, -2))}, bytes(8)),
    "shape of text": lambda _: safetensors({"a": entry("22")}, bytes(8)),
    "shape in shape": lambda _: safetensors({"a": entry(((2,),))}, bytes(8)),
    "shape of 10,000 dimensions": lambda _: safetensors({"a": entry((1,) * 10_000, (0, 4))}, bytes(4)),
    "wrong size": lambda _: safetensors({"a": entry((3,))}, bytes(8)),
    "unknown dtype": lambda _: safetensors({"a": entry(dtype="PICKLE")}, bytes(8)),
    "dtype in small letters": lambda _: safetensors({"a": entry(dtype="f32")}, bytes(8)),
    "dtype of a list": lambda _: safetensors({"a": entry(dtype=["F32"])}, bytes(8)),
    "no dtype": lambda _: safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "more than the format has": lambda _: safetensors({"a": {**entry(), "code": "import os"}}, bytes(8)),
    "name that leaves": lambda canary: safetensors({f"../../../{canary}": entry()}, bytes(8)),
    "absolute name": lambda canary: safetensors({str(canary): entry()}, bytes(8)),
    "name with a NUL": lambda _: safetensors({"model.norm.weight\0": entry((8,), (0, 32))}, bytes(32)),
    "name of other letters": lambda _: safetensors({"model.nоrm.weight": entry((8,), (0, 32))}, bytes(32)),
    "name of half a letter": lambda _: safetensors(rb'{"\ud800": %s}' % json.dumps(entry()).encode(), bytes(8)),
}


@pytest.mark.parametrize("what", FILES)
def test_a_weight_file_is_refused(what: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / SINGLE).write_bytes(FILES[what](canary))
    refused(tmp_path / "hf", canary)


def test_the_same_reader_loads_a_good_file(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / SINGLE)
    load(tmp_path)


def test_a_pickle_alone_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(torch_file_of(tmp_path / "canary"))
    assert "convert it to safetensors" in refused(tmp_path, tmp_path / "canary")


@pytest.mark.parametrize("name", [SINGLE, INDEX])
@pytest.mark.parametrize("what", SPECIAL)
def test_what_is_no_plain_file_is_refused(what: str, name: str, tmp_path: Path) -> None:
    replace_by(tmp_path / name, what)
    refused(tmp_path, tmp_path / "canary")


@pytest.mark.parametrize("name", [SINGLE, INDEX])
def test_a_large_file_of_nothing_is_refused(name: str, tmp_path: Path) -> None:
    sparse(tmp_path / name, 1 << 40)
    refused(tmp_path, tmp_path / "canary")


def sharded(directory: Path, weight_map: object) -> None:
    save_file(weights(), directory / "model-1.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


PLACES = {
    "above": "../secret.safetensors",
    "far above": "../../../../../../../../etc/passwd",
    "absolute": "/etc/passwd",
    "hidden in the middle": "a/../../secret.safetensors",
    "below": "sub/secret.safetensors",
    "dot": "./model-1.safetensors",
    "twice a slash": "//model-1.safetensors",
    "backslash": "..\\secret.safetensors",
    "NUL": "model-1.safetensors\0.bin",
    "wide dots": "．．／secret.safetensors",
    "other slash": "..∕secret.safetensors",
    "half a letter": "\ud800.safetensors",
    "pickle": "pytorch_model.bin",
    "empty": "",
    "number": 7,
    "list": ["model-1.safetensors"],
    "nothing": None,
    "very long": "a" * 1000 + ".safetensors",
}


@pytest.mark.parametrize("what", PLACES)
def test_an_index_cannot_name_another_place(what: str, tmp_path: Path) -> None:
    directory = tmp_path / "hf"
    directory.mkdir()
    save_file({"model.norm.weight": torch.ones(8)}, tmp_path / "secret.safetensors")
    sharded(directory, {**dict.fromkeys(SHAPES, "model-1.safetensors"), "model.norm.weight": PLACES[what]})
    refused(directory, tmp_path / "canary")


INDEXES = {
    "pickle": lambda canary: pickle_of(canary),
    "empty": lambda _: b"",
    "a list": lambda _: b"[]",
    "no map": lambda _: b"{}",
    "map of a list": lambda _: b'{"weight_map": []}',
    "map of nothing": lambda _: b'{"weight_map": null}',
    "empty map": lambda _: b'{"weight_map": {}}',
    "nested deeply": lambda _: b'{"weight_map": ' + nested() + b"}",
    "not UTF-8": lambda _: b'{"weight_map": {"\xff": "a"}}',
    "UTF-16": lambda _: json.dumps({"weight_map": {}}).encode("utf-16"),
    "NaN": lambda _: b'{"metadata": {"total_size": NaN}, "weight_map": {}}',
    "infinity": lambda _: b'{"metadata": {"total_size": -Infinity}, "weight_map": {}}',
    "5,000 digits": lambda _: b'{"metadata": {"total_size": ' + b"9" * 5000 + b'}, "weight_map": {}}',
    "a key twice": lambda _: b'{"weight_map": {"a": "model-1.safetensors", "a": "model-1.safetensors"}}',
    "100,000 keys, the last one twice": lambda _: (
        b'{"weight_map": {' + b"".join(b'"%d": "x",' % i for i in range(100_000)) + b'"99999": "x"}}'
    ),
    "cut short": lambda _: b'{"weight_map": {"a": "model-1.saf',
}


@pytest.mark.parametrize("what", INDEXES)
def test_an_index_is_refused(what: str, tmp_path: Path) -> None:
    sharded(tmp_path, {})
    (tmp_path / INDEX).write_bytes(INDEXES[what](tmp_path / "canary"))
    refused(tmp_path, tmp_path / "canary")
