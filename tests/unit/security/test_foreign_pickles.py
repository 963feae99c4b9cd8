"""Pickles and archives that somebody else made to run code, to reach other bytes or to keep a reader busy."""

import contextlib
import io
import itertools
import struct
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools.foreign import (
    DcpChunk,
    DcpMetadata,
    DcpTensor,
    Stub,
    dump_dcp_metadata,
    read_archive,
    read_dcp_metadata,
)
from checkpoints_tools.foreign.pickles import read_pickle
from checkpoints_tools.foreign.values import PickleError
from megalemur.checkpoint.errors import DamagedCheckpoint
from tests.support.malice import (
    SPECIAL,
    patience,
    pickle_of,
    pickle_of_chunks,
    replace_by,
    run_pickle,
    sparse,
    torch_file_of,
)

SECONDS = 1
"""Of the processor. What is refused takes a fraction of it; what has no bound takes for ever."""


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


def numbers(values: Iterable[int]) -> bytes:
    """A tuple of whole numbers below 2**63."""
    return b"(" + b"".join(b"\x8a\x08" + value.to_bytes(8, "little") for value in values) + b"t"


def of_one_hash(count: int) -> list[tuple[int, int]]:
    """Pairs of numbers of one hash in Python: the second undoes what the first did (xxHash's rounds, on 64 bits)."""
    one, two, five, bits = 11400714785074694791, 14029467366897019727, 2870177450012600261, (1 << 64) - 1
    found: list[tuple[int, int]] = []
    for first in itertools.count():
        state = five + first * two & bits
        state = (state << 31 | state >> 33) * one & bits
        second = (12345 - state) * pow(two, -1, 1 << 64) & bits
        if second < (1 << 61) - 1:
            found.append((first, second))
        if len(found) == count:
            assert len(set(map(hash, found))) == 1
            return found


OF_ONE_HASH = of_one_hash(20_000)
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
    "pairs of numbers of one hash": b"}(" + b"".join(numbers(pair) + b"N" for pair in OF_ONE_HASH) + b"u.",
    "a set of them": b"\x80\x04\x8f(" + b"".join(map(numbers, OF_ONE_HASH)) + b"\x90.",
    "a memo of 2**32 places": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a call with a long list, many times": LONG_LIST + b"0ca\nb\nq\x01" + b"0h\x01h\x00R" * 100_000 + b".",
    "a tensor of many arguments, many times": (
        b"(" + b"N" * 100_000 + b"tq\x000ctorch._utils\n_rebuild_tensor_v3\nq\x01" + b"0h\x01h\x00R" * 100_000 + b"."
    ),
    "a name of a megabyte, many times": text("x" * 1_000_000) + b"q\x00" + b"0h\x00h\x00\x93" * 100_000 + b".",
    "equal keys of a megabyte, many times": (
        text("x" * 1_000_000) + b"q\x00" + text("x" * 1_000_000) + b"q\x01}h\x00Ns" + b"h\x01Ns" * 100_000 + b"."
    ),
    "bytes of a megabyte, made many times": (
        text("x" * 1_000_000) + text("latin1") + b"\x86q\x00c_codecs\nencode\nq\x01" + b"0h\x01h\x00R" * 100_000 + b"."
    ),
    "an OrderedDict of many pairs, many times": (
        b"ccollections\nOrderedDict\nq\x00(](NN\x86" + b"2" * 50_000 + b"etq\x01" + b"0h\x00h\x01R" * 100_000 + b"."
    ),
    "ten million values": b"N" * 10_000_000 + b".",
    "ten million lists": b"]" * 10_000_000 + b".",
    "ten million marks": b"(" * 10_000_000 + b".",
    "ten million sets": b"\x80\x04" + b"\x8f" * 10_000_000 + b".",
    "ten million copies": b"N" + b"2" * 10_000_000 + b".",
    "ten million places of a memo": b"\x80\x04N" + b"\x94" * 10_000_000 + b".",
    "a nest of five million": b"]" * 5_000_000 + b"a" * 4_999_999 + b".",
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
        start = time.process_time()
        with pytest.raises(PickleError):
            read_pickle({**BOMBS, **BROKEN}[name], lambda pid: pid[5])
        assert time.process_time() - start < SECONDS


def flood(unit: bytes, *, start: bytes = b"") -> bytes:
    """Half a megabyte of the same few opcodes, and text for as many bytes as it takes until they count as sparse."""
    many = unit * 20 + text("x" * (12 * len(unit)))
    return start + many * ((512 << 10) // len(many)) + b"."


FLOODS = {
    "lists": flood(b"]"),
    "numbers": flood(b"K\x01"),
    "empty integers": flood(b"\x8a\x00"),
    "text": flood(b"\x8c\x01a"),
    "items": flood(b"h\x00h\x01s", start=b"Nq\x010}q\x00"),
    "numbers in a dict": b"}(" + b"".join(b"M" + struct.pack("<H", n & 0xFFFF) + b"N" for n in range(131_000)) + b"u.",
    "names": flood(b"ca\nb\n0"),
    "other names": b"".join(b"ca\n%x\n0" % n for n in range(60_000)) + b"N.",
    "calls": flood(b"h\x00)R0" + text("x" * 9), start=b"ca\nb\nq\x00"),
    "objects": flood(b"h\x00)\x81Nb" + text("x" * 9), start=b"ca\nb\nq\x00"),
    "shapes": flood(b"h\x00)R0" + text("x" * 9), start=b"ctorch\nSize\nq\x00"),
    "dicts": flood(b"h\x00)R0" + text("x" * 9), start=b"ccollections\nOrderedDict\nq\x00"),
    "frames": b"\x95" + b"\x00" * 8 + b"N" + (b"\x95" + b"\xff" * 8) * 58_000 + b".",
}


@pytest.mark.parametrize("name", FLOODS)
def test_what_is_dense_but_not_too_dense_costs_what_its_bytes_are_worth(name: str):
    # a quarter of the longest pickle of an archive in a quarter of the time, and some for a busy machine
    start = time.process_time()
    with contextlib.suppress(PickleError):
        read_pickle(FLOODS[name])
    assert time.process_time() - start < SECONDS / 2


def test_what_torch_writes_is_not_too_dense():
    for protocol in (2, 4, 5):
        data = pickle_of_chunks(20_000, protocol)
        assert len(data) > 2_000_000
        read_pickle(data)
        fewer = pickle_of_chunks(2_000, protocol)
        with pytest.raises(PickleError, match="steps"):
            read_pickle(fewer[:-1] + b"N0" * 3 * len(fewer) + b".")


def test_a_frame_of_any_size_takes_no_memory():
    with patience():
        assert read_pickle(b"\x80\x04\x95" + bytes(7) + b"\x10N.") == (None, ())


def test_a_deep_nest_is_read_and_thrown_away():
    # neither reading nor freeing it may go one call deeper for each of its levels
    with patience():
        tree, _ = read_pickle(b"]" * 30_000 + b"a" * 29_999 + b".")
    assert len(tree) == 1


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


UNFOLDING = {
    "a list in itself": b"]q\x00h\x00a.",
    "a dict in itself": b"}q\x00" + text("model") + b"h\x00s.",
    "a list of two of a list of two": LISTS + b".",
    "settings of two of a list of two": b"cargparse\nNamespace\n)R}" + text("x") + LISTS + b"sb.",
    "a list of 500 of a list of 500": b"](" + b"N" * 500 + b"eq\x00](" + b"h\x00" * 500 + b"e.",
    "seventeen levels": b"]" * 18 + b"a" * 17 + b".",
}


@pytest.mark.parametrize("name", UNFOLDING)
def test_values_that_have_no_end_for_who_walks_them_are_refused(name: str, tmp_path: Path):
    path = write(tmp_path / "x.pt", archive(GOOD | {"data.pkl": UNFOLDING[name]}))
    start = time.process_time()
    with patience(), pytest.raises(DamagedCheckpoint, match="deeper in each other"):
        read_archive(path)
    assert time.process_time() - start < SECONDS


def test_values_that_end_are_read(tmp_path: Path):
    # the test before this one could fail: sharing and depth alone are no reason
    data = b"]" * 16 + b"a" * 15 + b"0](" + b"N" * 50 + b"eq\x00](" + b"h\x00" * 50 + b"e."
    assert len(read_archive(write(tmp_path / "x.pt", archive(GOOD | {"data.pkl": data}))).tree) == 50


GOOD = {"data.pkl": tensor_pickle(), "byteorder": b"little", "data/0": bytes(16), "version": b"3\n"}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_the_archive_that_the_others_are_made_of_is_good(tmp_path: Path):
    found = read_archive(write(tmp_path / "x.pt", archive(GOOD)))
    assert (found.tree.shape, found.tree.dtype, found.stubs) == ((4,), torch.float32, ())


@pytest.mark.parametrize("at", [0, 40, -2])
def test_a_bit_that_fell_over_in_the_pickle_is_seen(at: int, tmp_path: Path):
    data, pickle = bytearray(archive(GOOD)), GOOD["data.pkl"]
    where = data.index(pickle) + (at if at >= 0 else len(pickle) + at)
    data[where] ^= 0x10
    path = write(tmp_path / "x.pt", bytes(data))
    with pytest.raises(DamagedCheckpoint, match=r"x\.pt: .*archive/data\.pkl.*CRC-32"):
        read_archive(path)


def test_a_crc_that_torch_did_not_compute_is_no_damage(tmp_path: Path):
    data = io.BytesIO()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.ones(3)}, data)
    finally:
        torch.serialization.set_crc32_options(before)
    assert zipfile.ZipFile(data).getinfo("archive/data.pkl").CRC == 0
    assert read_archive(write(tmp_path / "x.pt", data.getvalue())).tree["x"].shape == (3,)


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


TENSOR = DcpTensor((8,), torch.float32, (DcpChunk((0,), (8,), "f", 0, 64),))


def metadata_of(**changes: Any) -> bytes:
    return dump_dcp_metadata(DcpMetadata({"a": TENSOR, "b": TENSOR._replace(**changes)}))


def test_archives_of_a_distributed_checkpoint_may_be_named_twice_and_have_no_part_in_common(tmp_path: Path):
    def chunk(first: int, length: int) -> bytes:
        return metadata_of(chunks=(TENSOR.chunks[0]._replace(first=first, length=length),))

    for place in ((0, 64), (64, 64)):
        assert len(read_dcp_metadata(write(tmp_path / "x", chunk(*place))).tensors) == 2
    for place in ((1, 63), (0, 65), (63, 64)):
        with pytest.raises(DamagedCheckpoint, match="f: two archives have bytes from"):
            read_dcp_metadata(write(tmp_path / "x", chunk(*place)))


def test_metadata_that_keep_a_reader_busy_are_refused(tmp_path: Path):
    many = tuple(DcpChunk(pair, (1, 1), "f", 64 * n, 64) for n, pair in enumerate(OF_ONE_HASH[:5000]))
    of_one_hash = metadata_of(size=(1 << 61, 1 << 61), chunks=many)
    twice = metadata_of(chunks=TENSOR.chunks * 2)
    long = metadata_of(size=tuple(range(10)))
    for data, why in ((of_one_hash, None), (twice, "b: it has two chunks at"), (long, "at most 9 numbers")):
        path, start = write(tmp_path / "x", data), time.process_time()
        if why is None:
            assert len(read_dcp_metadata(path).tensors["b"].chunks) == 5000
        else:
            with pytest.raises(DamagedCheckpoint, match=why):
                read_dcp_metadata(path)
        assert time.process_time() - start < SECONDS


def test_a_files_code_is_a_stub_in_archives_and_refused_as_metadata(tmp_path: Path):
    canary = tmp_path / "canary"
    found = read_archive(write(tmp_path / "x.pt", torch_file_of(canary)))
    assert isinstance(found.tree, Stub) and found.stubs == ("posix.system",)
    with pytest.raises(DamagedCheckpoint):
        read_dcp_metadata(write(tmp_path / ".metadata", pickle_of(canary)))
    assert not canary.exists()
