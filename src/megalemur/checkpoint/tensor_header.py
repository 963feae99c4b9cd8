"""The header of a safetensors file, read as strictly as the format is written down. Free of torch.

Refuses duplicate names, gaps, overlaps, sizes that do not fit and headers beyond 100 MB; trusts no number it reads.
The library's own reader maps the file, and a mapped file that is cut short ends the process instead of the load.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from megalemur.checkpoint.errors import DamagedCheckpoint, UnreadableCheckpoint
from megalemur.config.plain_files import open_plain
from megalemur.config.strict_json import parse_json

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_MAX_DIMENSIONS = 8

ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
ITEM_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
"""safetensors' words for dtypes whose elements are whole bytes."""


class HeaderEntry(NamedTuple):
    """A tensor in a file."""

    dtype: str
    """safetensors' word; one that ITEM_BYTES lacks cannot be read."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int
    """The byte behind the last."""


class Header(NamedTuple):
    """What a file says about itself."""

    size: int
    """Bytes of the file."""
    tensors: dict[str, HeaderEntry]
    """In the order of their bytes."""


def read_header(path: Path, *, follow_links: bool = True) -> Header:
    """The checked header; no tensor is read.

    Raises:
        DamagedCheckpoint: no plain file, or no complete safetensors file.
    """
    try:
        with os.fdopen(open_plain(path, follow_links=follow_links), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            room = min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES)
            if length > room:
                raise ValueError(f"its header claims {length} bytes, and {max(0, room)} are possible")
            text = os.pread(file.fileno(), length, _LENGTH_BYTES)
        return Header(size, _entries(parse_json(text), _LENGTH_BYTES + length, size))
    except OSError as error:
        raise UnreadableCheckpoint(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedCheckpoint(path, f"is no complete safetensors file: {error}") from error


def _entries(table: Any, first: int, size: int) -> dict[str, HeaderEntry]:
    if not isinstance(table, dict):
        raise ValueError("its header is no JSON object")
    found = {name: _entry(name, said, first) for name, said in table.items() if name != "__metadata__"}
    at, ordered = first, sorted(found.items(), key=lambda item: (item[1].start, item[1].stop))
    for name, entry in ordered:
        if entry.start != at:
            raise ValueError(f"{name!r} begins at byte {entry.start}, where the one before it ends at {at}")
        at = entry.stop
    if at != size:
        raise ValueError(f"its tensors end at byte {at}, the file at {size}")
    return dict(ordered)


def _entry(name: str, said: Any, first: int) -> HeaderEntry:
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} wants dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{name!r}: dtype {dtype!r} and shape {shape!r} make no tensor")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r}: data_offsets {offsets!r} are no range of bytes")
    elements = 1
    for extent in shape:
        elements *= extent
    start, stop = offsets
    if dtype in ITEM_BYTES and stop - start != elements * ITEM_BYTES[dtype]:
        raise ValueError(f"{name!r}: {dtype} {shape} does not take {stop - start} bytes")
    return HeaderEntry(dtype, tuple(shape), first + start, first + stop)


def _are_counts(values: Any) -> bool:
    """Whether this is a list of whole numbers from 0 up, each small enough for a file's size."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)
