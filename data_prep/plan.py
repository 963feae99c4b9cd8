"""Cuts the input into units of work, as a function of the input alone: not of workers, machines or interruptions.

A unit is a byte range of one JSON-lines file, some row groups of one Parquet file, several whole small files, or one
large compressed file (or standard input), which one reader cuts into chunks for all workers.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from data_prep.inputs import Source

_SMALLEST, _LARGEST = 2 << 20, 256 << 20
_UNITS = 4096  # about as many as there are at most, below _UNITS x _LARGEST = 1 TiB
STREAM_BYTES = 8 << 20
"""A compressed file of this size and more is read by one process and encoded by all, while such files are few."""
_FEW = 256


class Unit(NamedTuple):
    """A piece of the input that is encoded as a whole."""

    kind: Literal["range", "rows", "files", "stream"]
    first: int
    """Number of the first source."""
    last: int
    """Number of the last source, itself included; another than `first` only for files."""
    start: int
    """First byte of a range, first row group of rows."""
    stop: int
    """The byte or row group behind the last one. A line belongs where it begins."""
    weight: int
    """Stored bytes."""


def make_units(sources: Sequence[Source]) -> list[Unit]:
    """All units, in the order of their documents."""
    total = sum(source.size or 0 for source in sources)
    size = min(max(_SMALLEST, total // _UNITS), _LARGEST)
    large = sum(1 for source in sources if source.compression and (source.size or 0) >= STREAM_BYTES)
    units: list[Unit] = []
    for number, source in enumerate(sources):
        if source.size is None or (source.compression and large < _FEW and source.size >= STREAM_BYTES):
            units.append(_whole("stream" if source.format == "jsonl" else "files", number, source))
        elif source.format == "jsonl" and source.compression is None and source.size > size:
            units += _ranges(number, source.size, size)
        elif source.format == "parquet" and source.size > size:
            units += _row_groups(number, source, size)
        elif units and _joins(units[-1], number, source.size, size):
            units[-1] = units[-1]._replace(last=number, weight=units[-1].weight + source.size)
        else:
            units.append(_whole("files", number, source))
    return units


def _whole(kind: Literal["files", "stream"], number: int, source: Source) -> Unit:
    return Unit(kind, number, number, 0, 0, source.size or 0)


def _joins(unit: Unit, number: int, size: int, limit: int) -> bool:
    """Whether a whole file goes into the unit before it."""
    return unit.kind == "files" and unit.last == number - 1 and unit.weight + size <= limit


def _ranges(number: int, total: int, size: int) -> Iterator[Unit]:
    count = -(-total // size)
    for k in range(count):
        start, stop = total * k // count, total * (k + 1) // count
        yield Unit("range", number, number, start, stop, stop - start)


def _row_groups(number: int, source: Source, size: int) -> Iterator[Unit]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with source.open() as stream:
            facts = parquet.ParquetFile(stream).metadata
            weights = [facts.row_group(k).total_byte_size for k in range(facts.num_row_groups)]
    except (arrow.ArrowException, OSError):  # told when it is read, with the other bad documents
        yield _whole("files", number, source)
        return
    scale = (source.size or 0) / max(1, sum(weights))
    start = 0
    for k in range(1, len(weights) + 1):
        if k == len(weights) or sum(weights[start : k + 1]) * scale > size:
            yield Unit("rows", number, number, start, k, round(sum(weights[start:k]) * scale))
            start = k


def part_of(units: Sequence[Unit], part: int, parts: int) -> range:
    """Numbers of the units of one part: consecutive ones, about equally heavy."""
    total = sum(unit.weight + 1 for unit in units)
    owners, before = [], 0
    for unit in units:
        owners.append(min(parts - 1, (2 * before + unit.weight + 1) * parts // (2 * total)))
        before += unit.weight + 1
    mine = [number for number, owner in enumerate(owners) if owner == part]
    return range(mine[0], mine[-1] + 1) if mine else range(0)
