"""Pickles and archives that somebody else made to run code, to reach other bytes or to keep a reader busy."""

import io
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools.foreign import Stub, read_archive, read_dcp_metadata
from checkpoints_tools.foreign.machine import PickleError
from checkpoints_tools.foreign.pickles import read_pickle
from megalemur.checkpoint.errors import DamagedCheckpoint
from tests.support.malice import SPECIAL, patience, pickle_of, replace_by, run_pickle, sparse, torch_file_of

SECONDS = 3
"""A refusal takes a fraction of it, also on a busy machine; what has no bound takes for ever."""


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def command(canary: Path) -> bytes:
    return text(f"touch {canary}")


RUNNING = {
    "reduce of os.system": lambda c: b"cos\nsystem\n(" + command(c) + b"tR.",
    "reduce of posix.system": lambda c: b"cposix\nsystem\n(" + command(c) + b"tR.",
    "reduce of eval": lambda c: b"cbuiltins\neval\n(" + text(f"open({str(c)!r}, 'w')") + b"tR.",
    "reduce of Python 2's eval": lambda c: b"c__builtin__\neval\n(" + text(f"open({str(c)!r}, 'w')") + b"tR.",
    "stack global of exec": lambda c: text("builtins") + text("exec") + b"\x93" + command(c) + b"\x85R.",
    "newobj of Popen": lambda c: b"\x80\x02csubprocess\nPopen\n(" + command(c) + b"t\x81.",
    "newobj_ex of Popen": lambda c: b"\x80\x04csubprocess\nPopen\n)}" + text("args") + command(c) + b"s\x92.",
    "inst of os.system": lambda c: b"(" + command(c) + b"ios\nsystem\n.",
    "obj of os.system": lambda c: b"(cos\nsystem\n" + command(c) + b"o.",
    "state of a class that acts on it": lambda c: b"cargparse\n_SubParsersAction\n)R(" + command(c) + b"tb.",
    "state under __setstate__": lambda c: (
        b"ctorch\nTensor\n)\x81}" + text("__setstate__") + b"cos\nsystem\n" + b"sb" + command(c) + b"b."
    ),
    "a global called by what it returned": lambda c: (
        b"cbuiltins\ngetattr\n(cos\nsystem\n" + text("__call__") + b"tR(" + command(c) + b"tR."
    ),
    "a dotted name": lambda c: text("torch") + text("os.system") + b"\x93(" + command(c) + b"tR.",
    "a rebuild with a function for a storage": lambda c: (
        b"ctorch._utils\n_rebuild_tensor_v2\n(cos\nsystem\nK\x00))\x89}tR."
    ),
    "a subclass that rebuilds by os.system": lambda c: (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n" + command(c) + b"\x85}tR."
    ),
    "an extension": lambda _: b"\x80\x02\x82\x01.",
    "a large extension": lambda _: b"\x80\x02\x84\x01\x00\x00\x00.",
    "a buffer from outside": lambda _: b"\x80\x05\x97.",
    "a persistent id": lambda _: b"cos\nsystem\nQ.",
    "a persistent id as text": lambda _: b"Pstorage\n.",
    "os.system as a tensor's hooks": lambda c: b"ccollections\nOrderedDict\n(cos\nsystem\ntR.",
    "a default that is a function": lambda c: b"ccollections\ndefaultdict\n(cos\nsystem\ntR.",
}


REFUSED = {
    *("an extension", "a large extension", "a buffer from outside", "a persistent id", "a persistent id as text"),
    *("a global called by what it returned", "a rebuild with a function for a storage"),
    "os.system as a tensor's hooks",
}


@pytest.mark.parametrize("name", RUNNING)
def test_nothing_that_a_pickle_names_is_called(name: str, tmp_path: Path):
    canary = tmp_path / "canary"
    with patience():
        if name in REFUSED:
            with pytest.raises(PickleError):
                read_pickle(RUNNING[name](canary))
        else:
            tree, _ = read_pickle(RUNNING[name](canary))
            assert isinstance(tree, Stub) or tree == {}
    assert not canary.exists()


def test_pythons_own_reader_runs_them(tmp_path: Path):
    # otherwise the test before this one could not fail
    canary = tmp_path / "canary"
    run_pickle(RUNNING["reduce of os.system"](canary))
    assert canary.exists()


def test_what_was_not_called_is_named():
    assert read_pickle(b"cos\nsystem\n(X\x02\x00\x00\x00lstR.")[1] == ("os.system",)


def doubled(levels: int, pair: bytes, start: bytes) -> bytes:
    """A value made of two of itself, so many times: 2**levels leaves, a few bytes a level."""
    return start + b"q\x00" + b"".join(b"0" + pair + b"q\x00" for _ in range(levels))


TUPLES = doubled(200, b"h\x00h\x00\x86", b")")
LISTS = doubled(90, b"](h\x00h\x00e", b"]")
LONG_LIST = b"](" + b"K\x01" * 100_000 + b"eq\x00"
BOMBS = {
    "a key of nested tuples": b"}" + TUPLES + b"Ns.",
    "a set of nested tuples": b"\x80\x04\x8f(" + TUPLES + b"\x90.",
    "a frozenset of nested tuples": b"\x80\x04(" + TUPLES + b"\x91.",
    "a shape of nested tuples": b"ctorch\nSize\n" + TUPLES + b"\x85R.",
    "a shape of nested lists": b"ctorch\nSize\n" + LISTS + b"\x85R.",
    "a storage's key of nested lists": b"(" + text("storage") + b"ctorch\nFloatStorage\n" + LISTS + b"NK\x01tQ.",
    "a hundred thousand copies of a long list": (
        LONG_LIST + b"0ctorch\nSize\nq\x01" + b"0h\x01h\x00\x85R" * 100_000 + b"."
    ),
    "a hundred thousand sets of a long list": (
        LONG_LIST + b"0c__builtin__\nset\nq\x01" + b"0h\x01h\x00\x85R" * 100_000 + b"."
    ),
    "a list that holds itself": b"]q\x00h\x00a" + b"ctorch\nSize\nh\x00\x85R.",
    "a string of 2**60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
    "a bytearray of 2**40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "an integer of 2**31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "an integer of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "an integer of a million bits": b"\x80\x02\x8b" + struct.pack("<I", 125_000) + b"\x7f" * 125_000 + b".",
    "keys of one hash": (
        b"}(" + b"".join(b"\x8a\x0c" + (n * (2**61 - 1)).to_bytes(12, "little") + b"N" for n in range(1, 9999)) + b"u."
    ),
}
BROKEN = {
    "empty": b"",
    "no end": b"N",
    "an unknown opcode": b"\xff.",
    "a stack that is empty": b"0.",
    "a mark that is missing": b"t.",
    "a memo that is missing": b"h\x05.",
    "a call of a number": b"K\x01)R.",
    "a call with no tuple": b"ctorch\nSize\nK\x01R.",
    "items of a number": b"K\x01K\x02K\x03s.",
    "an odd number of items": b"}(K\x01u.",
    "a shape below zero": b"ctorch\nSize\n(J\xff\xff\xff\xfft\x85R.",
    "a shape of text": b"ctorch\nSize\n(" + text("2") + b"t\x85R.",
    "text that is none": b"X\x02\x00\x00\x00\xff\xfe.",
}


@pytest.mark.parametrize("name", [*BOMBS, *BROKEN])
def test_a_pickle_that_keeps_a_reader_busy_or_is_none_is_refused(name: str):
    with patience():
        start = time.monotonic()
        with pytest.raises(PickleError):
            read_pickle({**BOMBS, **BROKEN}[name], lambda pid: pid[5])
        assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("data", [b"\x80\x02Nr\xff\xff\xff\xff.", b"\x80\x04\x95" + bytes(7) + b"\x10N."])
def test_a_memo_or_a_frame_of_any_size_takes_no_memory(data: bytes):
    with patience():
        assert read_pickle(data) == (None, ())


def test_a_deep_nest_is_read_and_thrown_away():
    # neither reading nor freeing it may go one call deeper for each of its levels
    with patience():
        tree, _ = read_pickle(b"]" * 200_000 + b"a" * 199_999 + b".")
    assert len(tree) == 1


@pytest.mark.parametrize(("what", "limit"), [("steps", "MAX_STEPS"), ("text", "MAX_TEXT_BYTES")])
def test_steps_and_text_are_counted(what: str, limit: str, monkeypatch: pytest.MonkeyPatch):
    data = b"](" + b"N" * 50 + text("x" * 50) + b"e."
    read_pickle(data)
    monkeypatch.setattr(f"checkpoints_tools.foreign.machine.{limit}", 49)
    with pytest.raises(PickleError, match="49"):
        read_pickle(data)


def archive(records: dict[str, bytes], *, method: int = zipfile.ZIP_STORED, prefix: str = "archive/") -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as file:
        for name, content in records.items():
            file.writestr(prefix + name, content)
    return data.getvalue()


def tensor_pickle(
    *, key: str = "0", elements: int = 4, offset: int = 0, shape: Any = (4,), strides: Any = (1,), kind: str = "Float"
) -> bytes:
    """A data.pkl of one tensor, as torch.save writes it but for what is wrong with it."""
    number = lambda value: b"\x8a\x09" + value.to_bytes(9, "little", signed=True)  # noqa: E731
    numbers = lambda values: b"(" + b"".join(map(number, values)) + b"t"  # noqa: E731
    storage = b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text("cpu")
    tensor = storage + number(elements) + b"tQ" + number(offset) + numbers(shape) + numbers(strides)
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + tensor + b"\x89ccollections\nOrderedDict\n)RtR."


GOOD = {"data.pkl": tensor_pickle(), "byteorder": b"little", "data/0": bytes(16), "version": b"3\n"}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_the_archive_that_the_others_are_made_of_is_good(tmp_path: Path):
    found = read_archive(write(tmp_path / "x.pt", archive(GOOD)))
    assert (found.tree.shape, found.tree.dtype, found.stubs) == ((4,), torch.float32, ())


HUGE = 1 << 61
TENSORS = {
    "more elements than the storage has": {"shape": (5,)},
    "a storage larger than its record": {"elements": 5},
    "a storage of 2**61 elements": {"elements": HUGE, "shape": (HUGE,)},
    "a shape whose product is 2**122": {"shape": (HUGE, HUGE), "strides": (1, 1)},
    "strides beyond the storage": {"shape": (2, 2), "strides": (3, 1)},
    "an offset beyond the storage": {"offset": 1},
    "an empty tensor beyond the storage": {"offset": 5, "shape": (0,)},
    "a negative offset": {"offset": -1, "shape": (1,)},
    "a negative stride": {"offset": 3, "strides": (-1,)},
    "a negative extent": {"shape": (-1,)},
    "a negative storage": {"elements": -1, "shape": (0,)},
    "fewer strides than dimensions": {"shape": (2, 2)},
    "thousands of dimensions": {"shape": (1,) * 5000, "strides": (1,) * 5000},
    "a storage that is missing": {"key": "1"},
    "a path for a key": {"key": "../version"},
    "an absolute path for a key": {"key": "/etc/passwd"},
    "the pickle itself for a storage": {"key": "../data.pkl"},
    "an empty key": {"key": ""},
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_does_not_lie_in_its_record_is_refused(name: str, tmp_path: Path):
    records = GOOD | {"data.pkl": tensor_pickle(**TENSORS[name])}
    path = write(tmp_path / "x.pt", archive(records))
    with patience(), pytest.raises(DamagedCheckpoint, match=r"x\.pt"):
        read_archive(path)


def patched(data: bytes, magic: bytes, at: int, value: bytes, *, which: int = 0) -> bytes:
    """The archive with some bytes of a header replaced."""
    start = -1
    for _ in range(which + 1):
        start = data.index(magic, start + 1)
    return data[: start + at] + value + data[start + at + len(value) :]


LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


def overlapping() -> bytes:
    """data/1 begins where data/0 does."""
    data = archive(GOOD | {"data/1": bytes(16)})
    where = [n for n in range(len(data)) if data.startswith(CENTRAL, n)]
    offsets = [struct.unpack_from("<I", data, n + 42)[0] for n in where]
    # the entry of data/1, the last, points to the local header of data/0, the third
    return data[: where[4] + 42] + struct.pack("<I", offsets[2]) + data[where[4] + 46 :]


ARCHIVES = {
    "compressed records": lambda: archive(GOOD, method=zipfile.ZIP_DEFLATED),
    "an encrypted record": lambda: patched(archive(GOOD), CENTRAL, 8, b"\1\0", which=2),
    "records that overlap": overlapping,
    "two records of one name": lambda: archive(GOOD | {"data/1": bytes(16)}).replace(b"data/1", b"data/0"),
    "two pickles": lambda: archive(GOOD | {"x/data.pkl": b"N."}),
    "no pickle": lambda: archive({name: GOOD[name] for name in GOOD if name != "data.pkl"}),
    "big-endian numbers": lambda: archive(GOOD | {"byteorder": b"big"}),
    "a record of 4 GiB": lambda: patched(archive(GOOD), CENTRAL, 20, b"\xfe\xff\xff\xff\xfe\xff\xff\xff", which=2),
    "two sizes": lambda: patched(archive(GOOD), CENTRAL, 20, b"\x01\0\0\0", which=2),
    "a record before the file": lambda: patched(archive(GOOD), CENTRAL, 42, b"\xf0\xff\xff\xff", which=2),
    "a record in the middle of another": lambda: patched(archive(GOOD), CENTRAL, 42, b"\x05\0\0\0", which=2),
    "a directory of 4 GiB": lambda: patched(archive(GOOD), END, 12, b"\xfe\xff\xff\xff"),
    "a directory beyond the file": lambda: patched(archive(GOOD), END, 16, b"\xfe\xff\xff\x7f"),
    "more entries than there are": lambda: patched(archive(GOOD), END, 8, b"\xfe\xff\xfe\xff"),
    "64-bit fields that are missing": lambda: patched(archive(GOOD), CENTRAL, 20, b"\xff" * 8, which=2),
    "a 64-bit directory that is missing": lambda: patched(archive(GOOD), END, 16, b"\xff\xff\xff\xff"),
    "cut short": lambda: archive(GOOD)[:-30],
    "empty": lambda: b"",
    "an end and nothing else": lambda: END + bytes(18),
    "torch before 1.6": lambda: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_torch_does_not_write_is_refused(name: str, tmp_path: Path):
    path = write(tmp_path / "x.pt", ARCHIVES[name]())
    with patience(), pytest.raises(DamagedCheckpoint, match=r"x\.pt"):
        read_archive(path)


def test_the_refusal_of_an_old_file_says_what_to_do(tmp_path: Path):
    path = write(tmp_path / "x.pt", ARCHIVES["torch before 1.6"]())
    with pytest.raises(DamagedCheckpoint, match=r"torch before 1\.6.*torch\.save"):
        read_archive(path)


def test_any_cut_and_any_flipped_bit_ends_in_a_value_or_a_typed_error(tmp_path: Path):
    good = archive(GOOD)
    with patience():
        for n in range(len(good)):
            for data in (good[:n], good[:n] + bytes([good[n] ^ 1 << n % 8]) + good[n + 1 :]):
                path = write(tmp_path / "x.pt", data)
                try:
                    found = read_archive(path)
                except DamagedCheckpoint:
                    continue
                tree = found.tree
                if hasattr(tree, "offset"):
                    assert 0 <= tree.offset <= len(data)


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path):
    replace_by(tmp_path / "x", kind)
    for read in (read_archive, read_dcp_metadata):
        with patience(), pytest.raises(DamagedCheckpoint):
            read(tmp_path / "x")


def test_files_of_a_terabyte_are_refused_without_being_read(tmp_path: Path):
    sparse(tmp_path / "x", 1 << 40)
    for read in (read_archive, read_dcp_metadata):
        with patience(), pytest.raises(DamagedCheckpoint):
            read(tmp_path / "x")


def test_a_window_outside_the_file_is_refused(tmp_path: Path):
    path = write(tmp_path / "x.pt", archive(GOOD))
    for first, size in ((-1, 10), (0, 1 << 50), (1 << 50, None), (10, -1)):
        with pytest.raises(DamagedCheckpoint):
            read_archive(path, first, size)


def test_a_files_code_is_a_stub_in_archives_and_refused_as_metadata(tmp_path: Path):
    canary = tmp_path / "canary"
    found = read_archive(write(tmp_path / "x.pt", torch_file_of(canary)))
    assert isinstance(found.tree, Stub) and found.stubs == ("posix.system",)
    with pytest.raises(DamagedCheckpoint):
        read_dcp_metadata(write(tmp_path / ".metadata", pickle_of(canary)))
    assert not canary.exists()
