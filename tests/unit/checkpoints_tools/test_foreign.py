"""Files of torch.save and of its distributed checkpoints: read as torch reads them, and written for torch to read."""

import argparse
import os
import random
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader

from checkpoints_tools.foreign import (
    DcpChunk,
    DcpMetadata,
    DcpTensor,
    Namespace,
    PlannedTensor,
    StoredTensor,
    Stub,
    combined_crc,
    dump_archive,
    dump_dcp_metadata,
    frame_archive,
    read_archive,
    read_dcp_metadata,
)
from checkpoints_tools.foreign.zips import Plan, PlannedRecord
from checkpoints_tools.layout import Stretch
from megalemur.checkpoint.errors import DamagedCheckpoint

DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


def taken(path: Path, stored: StoredTensor) -> torch.Tensor:
    """The tensor that an offset, a shape and strides describe."""
    data = bytearray(path.read_bytes()[stored.offset : stored.offset + stored.bytes])
    flat = torch.frombuffer(data, dtype=stored.dtype) if data else torch.empty(0, dtype=stored.dtype)
    return flat.as_strided(stored.shape, stored.strides)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*as_bytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_every_dtype_is_where_it_is_said_to_be(dtype: torch.dtype, tmp_path: Path):
    tensor = torch.arange(60).view(5, 12).to(dtype)
    torch.save({"before": torch.zeros(7), "x": tensor}, tmp_path / "x.pt")
    assert same(taken(tmp_path / "x.pt", read_archive(tmp_path / "x.pt").tree["x"]), tensor)


def test_views_parameters_and_shared_storages(tmp_path: Path):
    base = torch.randn(6, 8)
    subclass = torch.nn.Parameter(base.clone())
    subclass.tensor_model_parallel = True  # an attribute, as megatron-core's parameters have
    plain = torch.randn(3)
    plain.note = "x"
    saved = {
        **{"base": base, "rows": base[2:4], "columns": base[:, 3:5], "turned": base.t(), "scalar": base[1, 1]},
        **{"parameter": torch.nn.Parameter(base.clone()), "subclass": subclass, "plain": plain},
        **{"empty": torch.empty(0, 3), "spread": torch.ones(1).expand(4, 4)},
    }
    torch.save(saved, tmp_path / "x.pt")
    found = read_archive(tmp_path / "x.pt")
    assert not found.stubs
    assert all(same(taken(tmp_path / "x.pt", found.tree[name]), saved[name].detach()) for name in saved)
    contiguous = {name for name, stored in found.tree.items() if stored.is_contiguous}
    assert contiguous == {name for name, tensor in saved.items() if tensor.is_contiguous()}
    assert found.tree["rows"].offset == found.tree["base"].offset + 2 * 8 * 4


def test_values_of_a_tree(tmp_path: Path):
    values = {
        **{"text": "é", "bytes": b"\x00\xff", "number": -(1 << 70), "real": 0.5, "none": None, "yes": True},
        **{"list": [1, [2]], "tuple": (1, (2,)), "size": torch.Size([3, 4]), "dtype": torch.bfloat16, 7: "key"},
    }
    run = argparse.Namespace(hidden_size=8, nested=argparse.Namespace(x=1))
    ordered = OrderedDict(a=1)
    ordered._metadata = "an attribute, as the state dict of a module has"
    torch.save({**values, "args": run, "ordered": ordered, "set": {1}}, tmp_path / "x.pt")
    tree = read_archive(tmp_path / "x.pt").tree
    assert {name: tree[name] for name in values} == values
    assert tree["ordered"] == {"a": 1} and set(tree["set"]) == {1}
    assert isinstance(tree["args"], Namespace)
    assert tree["args"].values["hidden_size"] == 8 and tree["args"].values["nested"].values == {"x": 1}


def test_what_is_unknown_is_a_stub_and_named(tmp_path: Path):
    torch.save({"path": Path("a"), "half": Fraction(1, 2), "x": torch.ones(2)}, tmp_path / "x.pt")
    found = read_archive(tmp_path / "x.pt")
    stub = found.tree["half"]
    assert found.stubs == ("fractions.Fraction",)
    assert isinstance(stub, Stub) and (stub.name, stub.arguments) == ("fractions.Fraction", (1, 2))


def test_a_shape_of_no_weight_is_a_stub(tmp_path: Path):
    torch.save(torch.eye(3).to_sparse(), tmp_path / "x.pt")
    assert isinstance(read_archive(tmp_path / "x.pt").tree, Stub)


def write_archive(path: Path, tree: Any, tensors: Mapping[str, torch.Tensor], *, at: int = 0) -> None:
    """What a conversion does: the tensors first, then the frames around them."""
    framed = frame_archive(tree, at)
    data = bytearray(at + framed.size)
    crcs = {}
    for name, tensor in tensors.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        data[framed.offsets[name] : framed.offsets[name] + len(content)] = content
        crcs[name] = zlib.crc32(content)
    for frame in framed.frames(crcs):
        assert not any(data[frame.offset : frame.offset + len(frame.data)]), "a frame lies over a tensor"
        data[frame.offset : frame.offset + len(frame.data)] = frame.data
    path.write_bytes(data)


TENSORS = {"a": torch.randn(5, 3), "b": torch.randn(7).bfloat16(), "c": torch.arange(3), "d": torch.empty(0, 4)}
PLANNED = {name: PlannedTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
PLAIN = {"text": "é", "bytes": b"\x00\xff", "number": 1 << 40, "real": 0.5, "none": None, "no": False}
TREE = {"model": OrderedDict(PLANNED), "inner": [(1, "x"), {"y": PLAIN}], "checkpoint_version": 3.0, **PLAIN}


def test_torch_reads_what_is_framed(tmp_path: Path):
    path = tmp_path / "x.pt"
    write_archive(path, TREE, TENSORS)
    for safe in (True, False):
        loaded = torch.load(path, weights_only=safe, mmap=not safe)
        assert all(same(loaded["model"][name], tensor) for name, tensor in TENSORS.items())
        assert type(loaded["model"]) is OrderedDict
        assert {**loaded, "model": None} == {**TREE, "model": None}
    assert subprocess.run([sys.executable, "-m", "zipfile", "-t", path], check=False).returncode == 0
    assert zipfile.ZipFile(path).testzip() is None
    tree = read_archive(path).tree
    assert all(same(taken(path, tree["model"][name]), tensor) for name, tensor in TENSORS.items())


def test_a_namespace_is_argparses(tmp_path: Path):
    path = tmp_path / "x.pt"
    path.write_bytes(dump_archive({"args": Namespace({"x": 1, "inner": Namespace({"y": [2]})})}))
    loaded = torch.load(path, weights_only=False)["args"]
    assert loaded == argparse.Namespace(x=1, inner=argparse.Namespace(y=[2]))


def test_a_wrong_crc_is_seen(tmp_path: Path):
    # so that the checks of the archives above could fail
    framed = frame_archive(PLANNED["a"])
    data = bytearray(framed.size)
    for frame in framed.frames({"a": 1}):
        data[frame.offset : frame.offset + len(frame.data)] = frame.data
    (tmp_path / "x.pt").write_bytes(data)
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() == "archive/data/0"


def test_several_archives_lie_one_behind_the_other(tmp_path: Path):
    path, at = tmp_path / "x.distcp", 0
    places = {}
    for name, tensor in TENSORS.items():
        write_archive(tmp_path / name, PLANNED[name], {name: tensor}, at=at)
        places[name] = (at, (tmp_path / name).stat().st_size - at)
        with path.open("ab") as file:
            file.write((tmp_path / name).read_bytes()[at:])
        at += places[name][1]
    for name, (first, size) in places.items():
        stored = read_archive(path, first, size).tree
        assert same(taken(path, stored), TENSORS[name])
        assert (stored.offset - first) % 64 == 0
    with pytest.raises(DamagedCheckpoint):
        read_archive(path, *(places["a"][0] + 1, places["a"][1]))


def test_archives_beyond_4_gib(tmp_path: Path):
    # a sparse file: one record is larger than 32 bits can say, and those behind it lie further
    path = tmp_path / "x.pt"
    large = (1 << 32) + 4096
    tree = {
        "large": PlannedTensor("large", torch.uint8, (large,)),
        "behind": PlannedTensor("behind", torch.float32, (4,)),
    }
    framed = frame_archive(tree)
    behind = torch.arange(4.0)
    with path.open("wb") as file:
        file.truncate(framed.size)
        for frame in framed.frames({"large": combined_crc([], 0, large), "behind": zlib.crc32(behind.numpy())}):
            file.seek(frame.offset)
            file.write(frame.data)
        file.seek(framed.offsets["behind"])
        file.write(behind.numpy())
    found = read_archive(path).tree
    assert (found["large"].shape, found["behind"].offset) == ((large,), framed.offsets["behind"])
    assert framed.offsets["behind"] > 1 << 32
    for safe in (True, False):
        loaded = torch.load(path, mmap=True, weights_only=safe)
        assert torch.equal(loaded["behind"], behind) and loaded["large"].shape == (large,)
    entries = {entry.filename: entry for entry in zipfile.ZipFile(path).infolist()}
    assert entries["archive/data/0"].file_size == large
    assert zipfile.ZipFile(path).read("archive/data/1") == behind.numpy().tobytes()


def test_more_records_than_16_bits_count(tmp_path: Path):
    plan = Plan([PlannedRecord(str(n), 0, b"") for n in range(66_000)], 0)
    data = bytearray(plan.size)
    for frame in plan.frames({}):
        data[frame.offset : frame.offset + len(frame.data)] = frame.data
    (tmp_path / "x.zip").write_bytes(data)
    assert len(zipfile.ZipFile(tmp_path / "x.zip").infolist()) == 66_000


@pytest.mark.parametrize("seed", range(20))
def test_crcs_of_stretches_and_gaps_make_that_of_the_record(seed: int):
    generator = random.Random(seed)
    data, stretches, at = bytearray(generator.randrange(1, 4_000_000)), [], 0
    first, end = generator.randrange(len(data)), len(data)
    at = first
    while at < end:
        at = min(end, at + generator.choice((0, 0, generator.randrange(1, 100_000))))
        length = min(end - at, generator.randrange(1, 900_000))
        data[at : at + length] = generator.randbytes(length)
        stretches.append(Stretch(at, length, zlib.crc32(data[at : at + length])))
        at += length
    generator.shuffle(stretches)
    other = Stretch(0, first, 123)  # of another record
    assert combined_crc([*stretches, other], first, end - first) == zlib.crc32(data[first:])
    wrong = [stretches[0]._replace(crc=stretches[0].crc ^ 1), *stretches[1:]]
    assert combined_crc(wrong, first, end - first) != zlib.crc32(data[first:])


def test_crc_of_nothing_and_of_terabytes():
    assert combined_crc([], 5, 0) == 0
    data = bytes(1 << 20)
    halves = [Stretch(0, 1 << 40, 7), Stretch(1 << 40, 1 << 20, zlib.crc32(data))]
    # adding a megabyte of zeros by zlib, or as a stretch
    assert combined_crc(halves, 0, (1 << 40) + (1 << 20)) == zlib.crc32(data, 7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A distributed checkpoint of torch's own."""
    path = tmp_path_factory.mktemp("dcp") / "x"
    state = {"a": torch.randn(4, 6), "b": torch.randn(5).bfloat16(), "deep": {"c": torch.arange(3)}, "step": [1, 2]}
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path, state


def test_metadata_that_torch_wrote(saved: tuple[Path, dict[str, Any]]):
    path, state = saved
    found = read_dcp_metadata(path / ".metadata")
    expected = {"a": state["a"], "b": state["b"], "deep.c": state["deep"]["c"]}
    assert found.tensors.keys() == expected.keys() and not found.notes
    assert {name for name in found.objects if name.startswith("step")} == set(found.objects)
    for name, tensor in expected.items():
        entry = found.tensors[name]
        (chunk,) = entry.chunks
        assert (entry.size, entry.dtype, chunk.offsets) == (tuple(tensor.shape), tensor.dtype, (0,) * tensor.ndim)
        stored = read_archive(path / chunk.file, chunk.first, chunk.length).tree
        assert same(taken(path / chunk.file, stored), tensor)


def test_torch_loads_a_checkpoint_whose_metadata_is_ours(saved: tuple[Path, dict[str, Any]], tmp_path: Path):
    path, state = saved
    found = read_dcp_metadata(path / ".metadata")
    for name in os.listdir(path):
        (tmp_path / name).write_bytes((path / name).read_bytes())
    (tmp_path / ".metadata").write_bytes(dump_dcp_metadata(found))
    assert read_dcp_metadata(tmp_path / ".metadata") == found
    target = {"a": torch.zeros(4, 6), "b": torch.zeros(5).bfloat16(), "deep": {"c": torch.zeros(3, dtype=torch.int64)}}
    dcp.load(target, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(target["a"], state["a"]) and torch.equal(target["b"], state["b"])
    assert torch.equal(target["deep"]["c"], state["deep"]["c"])


def test_chunks_that_are_cut_otherwise_are_loaded_by_torch(tmp_path: Path):
    # two chunks by columns and archives of ours, which torch puts together
    tensor = torch.arange(24.0).view(4, 6)
    chunks, at, file = [], 0, tmp_path / "__0_0.distcp"
    for column in (0, 3):
        part = tensor[:, column : column + 3].contiguous()
        plan = PlannedTensor("x", part.dtype, (4, 3))
        write_archive(tmp_path / "part", plan, {"x": part}, at=at)
        data = (tmp_path / "part").read_bytes()[at:]
        with file.open("ab") as whole:
            whole.write(data)
        chunks.append(DcpChunk((0, column), (4, 3), file.name, at, len(data)))
        at += len(data)
    metadata = DcpMetadata({"x": DcpTensor((4, 6), torch.float32, tuple(chunks))})
    (tmp_path / ".metadata").write_bytes(dump_dcp_metadata(metadata))
    target = {"x": torch.zeros(4, 6)}
    dcp.load(target, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(target["x"], tensor)


BAD_CHUNKS = {
    "a file of another directory": {"file": "../x.distcp"},
    "an absolute file": {"file": "/etc/passwd"},
    "a file in a folder": {"file": "a/x.distcp"},
    "a chunk outside the tensor": {"offsets": (0, 4)},
    "a chunk of another rank": {"offsets": (0,), "sizes": (4,)},
    "a chunk below zero": {"first": -1},
    "a length below zero": {"length": -5},
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_metadata_that_makes_no_sense_is_refused(name: str, tmp_path: Path):
    chunk = DcpChunk((0, 0), (4, 6), "__0_0.distcp", 0, 100)
    good = DcpMetadata({"x": DcpTensor((4, 6), torch.float32, (chunk,))})
    path = tmp_path / ".metadata"
    path.write_bytes(dump_dcp_metadata(good))
    assert read_dcp_metadata(path) == good
    bad = chunk._replace(**BAD_CHUNKS[name])
    path.write_bytes(dump_dcp_metadata(DcpMetadata({"x": DcpTensor((4, 6), torch.float32, (bad,))})))
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata"):
        read_dcp_metadata(path)
