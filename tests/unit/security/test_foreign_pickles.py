"""Pickles that somebody else made to run code, to reach other bytes or to keep a reader busy."""

import contextlib
import struct
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from checkpoints_tools.foreign import (
    Stub,
)
from checkpoints_tools.foreign.pickles import read_pickle
from checkpoints_tools.foreign.values import PickleError
from tests.support.bombs import LISTS, OF_ONE_HASH, SECONDS, doubled, text
from tests.support.malice import (
    patience,
    pickle_of_chunks,
    run_pickle,
)


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


def numbers(values: Iterable[int]) -> bytes:
    """A tuple of whole numbers below 2**63."""
    return b"(" + b"".join(b"\x8a\x08" + value.to_bytes(8, "little") for value in values) + b"t"


TUPLES = doubled(200, b"h\x00h\x00\x86", b")")
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
