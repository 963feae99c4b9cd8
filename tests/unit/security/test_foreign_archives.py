"""Archives that somebody else made to reach other bytes, to run code or to keep a reader busy."""

import io
import struct
import time
import zipfile
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
from megalemur.checkpoint.errors import DamagedCheckpoint
from tests.support.bombs import LISTS, OF_ONE_HASH, SECONDS, text
from tests.support.malice import (
    SPECIAL,
    patience,
    pickle_of,
    replace_by,
    sparse,
    torch_file_of,
)


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
