"""Zip archives as torch writes them: nothing compressed, so that a tensor can be read, or written, where it lies.

Read by hand: an archive may lie anywhere in a file, and no number in it is believed before it fits into that window.
"""

import os
import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from checkpoints_tools.layout import Frame
from megalemur.checkpoint.digests import read_at
from megalemur.checkpoint.errors import DamagedCheckpoint, UnreadableCheckpoint
from megalemur.config.plain_files import open_plain

_LOCAL, _CENTRAL, _END, _END64, _LOCATOR = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_END_RECORD = struct.Struct("<4s4H2LH")
_END64_RECORD = struct.Struct("<4sQ2H2L4Q")
_MAX_DIRECTORY_BYTES = 2 << 20
"""A record takes 83 bytes of it: room for 25,000, where all weights and moments of 405 billion parameters are 4,000."""
_MAX_COMMENT_BYTES = 0xFFFF
_BEYOND_32 = 0xFFFFFFFF
_ENCRYPTED = 1
_ALIGNMENT = 64
"""Tensors begin at multiples of this many bytes, as torch puts them."""
_PADDING = 0x4246
"""torch's own id for an extra field that only pads ("FB")."""


class Record(NamedTuple):
    """A file in an archive."""

    offset: int
    """First byte of its data in the file on the disk."""
    size: int
    crc: int
    """CRC-32 of its data, as the directory says."""


class Window:
    """Part of a file on the disk."""

    def __init__(self, path: Path, first: int = 0, size: int | None = None):
        self.path, self.first = path, first
        try:
            self._file = open_plain(path)
            there = os.fstat(self._file).st_size
        except OSError as error:
            raise UnreadableCheckpoint(path, f"cannot be read: {error.strerror}") from error
        self.size = there - first if size is None else size
        if first < 0 or self.size < 0 or first + self.size > there:
            os.close(self._file)
            raise DamagedCheckpoint(path, f"has {there} bytes, and bytes [{first}, {first + self.size}) are wanted")

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read(self, offset: int, count: int) -> bytes:
        """Bytes [offset, offset + count) of the window.

        Raises:
            DamagedCheckpoint: it ends before.
        """
        if offset < 0 or count < 0 or offset + count > self.size:
            raise self.damaged(f"bytes [{offset}, {offset + count}) lie outside its {self.size}")
        buffer = bytearray(count)
        at = self.first + offset
        try:
            found = read_at(self._file, memoryview(buffer), at, at + count)
        except OSError as error:
            raise UnreadableCheckpoint(self.path, f"cannot be read: {error.strerror}") from error
        if found < count:
            raise self.damaged(f"ends at byte {offset + found}")
        return bytes(buffer)

    def damaged(self, why: str) -> DamagedCheckpoint:
        """An error about this archive."""
        where = f" at byte {self.first}" if self.first else ""
        return DamagedCheckpoint(self.path, f"the archive{where} cannot be read: {why}")


def read_records(window: Window) -> dict[str, Record]:
    """Name to place of everything in the archive.

    Raises:
        DamagedCheckpoint: it is no zip archive, or one whose records are compressed, overlap or leave the window.
    """
    count, size, offset = _directory_place(window)
    if size > _MAX_DIRECTORY_BYTES or offset + size > window.size:
        raise window.damaged(f"its directory of {size} bytes at {offset} is impossible")
    data, at = window.read(offset, size), 0
    found: dict[str, Record] = {}
    for _ in range(count):
        name, record, at = _entry(window, data, at)
        if name in found:
            raise window.damaged(f"{name[:100]!r} is in it twice")
        found[name] = record
    ordered = sorted(found.values())
    for one, other in pairwise(ordered):
        if one.offset + one.size > other.offset:
            raise window.damaged(f"records overlap at byte {other.offset}")
    return found


def _directory_place(window: Window) -> tuple[int, int, int]:
    """(entries, bytes, offset) of the central directory."""
    tail = min(window.size, _END_RECORD.size + _MAX_COMMENT_BYTES)
    data = window.read(window.size - tail, tail)
    at = data.rfind(_END)
    if at < 0 or at + _END_RECORD.size > len(data):
        raise window.damaged(
            "it is no zip archive, or is cut short; torch before 1.6 wrote no archives: whoever trusts such a file "
            "loads it with torch.load and writes it again with torch.save"
        )
    *_, count, size, offset, _ = _END_RECORD.unpack_from(data, at)
    locator = window.size - tail + at - 20
    if _BEYOND_32 not in (size, offset) and count != 0xFFFF:
        return count, size, offset
    if locator < 0 or window.read(locator, 4) != _LOCATOR:
        raise window.damaged("it has no directory of a large archive")
    (where,) = struct.unpack("<Q", window.read(locator + 8, 8))
    record = _END64_RECORD.unpack(window.read(where, _END64_RECORD.size))
    if record[0] != _END64:
        raise window.damaged("its directory is not where it should be")
    return record[7], record[8], record[9]


def _entry(window: Window, data: bytes, at: int) -> tuple[str, Record, int]:
    if at + _ENTRY.size > len(data) or data[at : at + 4] != _CENTRAL:
        raise window.damaged("its directory is cut short")
    fields = _ENTRY.unpack_from(data, at)
    flags, method, crc, packed, size = fields[3], fields[4], *fields[7:10]
    name_bytes, extra_bytes, comment_bytes, header = fields[10], fields[11], fields[12], fields[16]
    start = at + _ENTRY.size
    name = data[start : start + name_bytes].decode("utf-8", "replace")
    extra = data[start + name_bytes : start + name_bytes + extra_bytes]
    size, packed, header = _wide(window, extra, size, packed, header)
    if method != 0 or packed != size or flags & _ENCRYPTED:
        raise window.damaged(f"{name[:100]!r} is compressed or encrypted, and tensors are read where they lie")
    local = _LOCAL_HEADER.unpack(window.read(header, _LOCAL_HEADER.size))
    if local[0] != _LOCAL:
        raise window.damaged(f"{name[:100]!r} is not where its directory says")
    offset = header + _LOCAL_HEADER.size + local[9] + local[10]
    if offset + size > window.size:
        raise window.damaged(f"{name[:100]!r} has {size} bytes at {offset}, beyond its end")
    return name, Record(window.first + offset, size, crc), start + name_bytes + extra_bytes + comment_bytes


def _wide(window: Window, extra: bytes, *values: int) -> list[int]:
    """Sizes and offsets beyond 32 bits stand in an extra field, in this order, those that need it."""
    found, at = list(values), 0
    while at + 4 <= len(extra):
        kind, count = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + count]
            for number, value in enumerate(found):
                if value == _BEYOND_32:
                    if len(field) < 8:
                        raise window.damaged("a size beyond 32 bits is missing")
                    (found[number],), field = struct.unpack_from("<Q", field), field[8:]
        at += 4 + count
    return found


class PlannedRecord(NamedTuple):
    """A record that will be written: its data, or only its size where the data come from elsewhere."""

    name: str
    size: int
    data: bytes | None


class Plan:
    """An archive before it is written: where each record's data will lie, and the bytes around them."""

    def __init__(self, records: Sequence[PlannedRecord], at: int):
        """Lay out.

        Args:
            records: in their order.
            at: first byte of the archive in its file.
        """
        self.records, self._at = records, at
        self.offsets: dict[str, int] = {}
        """Name to first byte of the data in the file."""
        self._headers: dict[str, int] = {}
        position = 0
        for record in records:
            self._headers[record.name] = position
            position += self._header_bytes(record, position)
            self.offsets[record.name] = at + position
            position += record.size
        self._end = position
        self.size = position + len(self._directory({}))

    def _header_bytes(self, record: PlannedRecord, position: int) -> int:
        plain = position + _LOCAL_HEADER.size + len(record.name.encode()) + len(_wide_sizes(record.size)) + 4
        return plain - position + -plain % _ALIGNMENT

    def frames(self, crcs: Mapping[str, int]) -> list[Frame]:
        """Everything but the data that come from elsewhere; their CRC-32 by name."""
        found = []
        for record in self.records:
            header = self._local(record, crcs.get(record.name, 0))
            found.append(Frame(self._at + self._headers[record.name], header + (record.data or b"")))
        return [*found, Frame(self._at + self._end, self._directory(crcs))]

    def _local(self, record: PlannedRecord, crc: int) -> bytes:
        name, wide = record.name.encode(), _wide_sizes(record.size)
        start = self._headers[record.name]
        room = self.offsets[record.name] - self._at - start - _LOCAL_HEADER.size - len(name) - len(wide)
        padding = struct.pack("<HH", _PADDING, room - 4) + bytes(room - 4)
        size = min(record.size, _BEYOND_32)
        return (
            _LOCAL_HEADER.pack(
                _LOCAL, 45 if wide else 20, 0, 0, 0, 0x21, crc, size, size, len(name), len(wide) + len(padding)
            )
            + name
            + wide
            + padding
        )

    def _directory(self, crcs: Mapping[str, int]) -> bytes:
        entries = b"".join(self._central(record, crcs.get(record.name, 0)) for record in self.records)
        count, size, offset = len(self.records), len(entries), self._end
        large = b""
        if max(size, offset) >= _BEYOND_32 or count >= 0xFFFF:
            large = _END64_RECORD.pack(_END64, 44, 45, 45, 0, 0, count, count, size, offset)
            large += struct.pack("<4sLQL", _LOCATOR, 0, offset + size, 1)
        short = min(count, 0xFFFF)
        end = _END_RECORD.pack(_END, 0, 0, short, short, min(size, _BEYOND_32), min(offset, _BEYOND_32), 0)
        return entries + large + end

    def _central(self, record: PlannedRecord, crc: int) -> bytes:
        name, header = record.name.encode(), self._headers[record.name]
        wide = [record.size] * 2 if record.size >= _BEYOND_32 else []
        wide += [header] if header >= _BEYOND_32 else []
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size, version = min(record.size, _BEYOND_32), 45 if wide else 20
        fields = (_CENTRAL, version, version, 0, 0, 0, 0x21, crc, size, size, len(name), len(extra), 0, 0, 0, 0)
        return _ENTRY.pack(*fields, min(header, _BEYOND_32)) + name + extra


def _wide_sizes(size: int) -> bytes:
    """The extra field of a local header with sizes beyond 32 bits."""
    return struct.pack("<HHQQ", 1, 16, size, size) if size >= _BEYOND_32 else b""
