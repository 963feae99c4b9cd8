"""Units as batches of texts, with what could not be read and where.

A batch is never larger than one document or about a megabyte, so memory is constant.
"""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import orjson

from data_prep.inputs import Source
from data_prep.plan import Unit
from data_prep.streams import DAMAGE, opened

_BATCH_BYTES = 1 << 20
_ROWS = 128
_BOM = b"\xef\xbb\xbf"


class Bad(NamedTuple):
    """A document that cannot be read."""

    line: int | None
    """Line (or row) from 1, counted from where the unit begins in its source; None: the file as a whole."""
    reason: str


@dataclass
class Batch:
    """Some documents of one source."""

    source: int
    """Its number."""
    texts: list[str] = field(default_factory=list)
    lines: list[int | None] = field(default_factory=list)
    """Where each text stands, as Bad.line."""
    bad: list[Bad] = field(default_factory=list)
    lines_read: int = 0
    """Lines or rows that this batch covers, bad and blank ones too."""
    size: int = 0

    def add(self, text: str, line: int | None) -> None:
        """A document."""
        self.texts.append(text)
        self.lines.append(line)
        self.size += len(text) + 64

    @property
    def full(self) -> bool:
        """Large enough to be encoded."""
        return self.size >= _BATCH_BYTES


class BadText(ValueError):
    """The reason why a line or row is no document."""


def read_unit(unit: Unit, sources: list[Source], key: str) -> Iterator[Batch]:
    """The documents of a unit that is no stream, in order."""
    if unit.kind == "range":
        yield from _guarded(unit.first, 1, _read_range(unit, sources[unit.first], key))
    elif unit.kind == "rows":
        yield from _guarded(unit.first, 1, _read_parquet(sources[unit.first], unit.first, key, unit))
    else:
        for number in range(unit.first, unit.last + 1):
            yield from _guarded(number, None, _read_file(sources[number], number, key))


def read_lines(data: bytes, source: int, key: str, *, begins: bool) -> Iterator[Batch]:
    """The documents of whole JSON lines that lie in memory; `begins`: at the beginning of a file."""
    yield from _json_batches(io.BytesIO(data), source, key, begins=begins)


def _guarded(source: int, line: int | None, batches: Iterator[Batch]) -> Iterator[Batch]:
    """A file that cannot be opened or decompressed is one bad document, behind those that could be read."""
    seen = 0
    try:
        for batch in batches:
            seen += batch.lines_read
            yield batch
    except DAMAGE as error:
        yield Batch(source, bad=[Bad(seen + 1 if seen else line, f"cannot be decompressed from here on ({error})")])
    except OSError as error:
        if error.errno is None:  # the codecs' own, such as bz2's
            yield Batch(source, bad=[Bad(seen + 1 if seen else line, f"cannot be decompressed from here on ({error})")])
        else:
            yield Batch(source, bad=[Bad(seen + 1 if seen else line, f"cannot be read: {error.strerror}")])


def _read_range(unit: Unit, source: Source, key: str) -> Iterator[Batch]:
    """Lines that begin in [start, stop)."""
    with source.open() as stream:
        if unit.start:
            stream.seek(unit.start - 1)
            # the end of a line that began before; of one that goes on beyond, only what lies in this range
            stream.readline(unit.stop - unit.start + 1)
        if stream.tell() < unit.stop:
            yield from _json_batches(stream, unit.first, key, begins=unit.start == 0, stop=unit.stop)


def _read_file(source: Source, number: int, key: str) -> Iterator[Batch]:
    if source.format == "parquet":
        return _read_parquet(source, number, key, None)
    if source.format == "arrow":
        return _read_arrow(source, number, key)
    return _read_bytes(source, number, key)


def _read_bytes(source: Source, number: int, key: str) -> Iterator[Batch]:
    with opened(source) as stream:
        if source.format == "jsonl":
            yield from _json_batches(stream, number, key, begins=True)
            return
        batch = Batch(number, lines_read=1)
        data = stream.read().removeprefix(_BOM)
        try:
            batch.add(data.decode("utf-8"), None)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            reason = f"byte {data[error.start]:#04x} at offset {error.start} is not UTF-8; convert the file"
            batch.bad.append(Bad(line, reason))
        yield batch


def _json_batches(
    stream: IO[bytes], source: int, key: str, *, begins: bool, stop: int | None = None
) -> Iterator[Batch]:
    """JSON lines from the stream's position to its end, or all that begin before `stop`.

    Where the stream breaks off, what stands before the break comes first. `begins`: a byte-order mark is no text.
    """
    batch, at = Batch(source), stream.tell() if stop is not None else 0
    lines = enumerate(stream, 1)
    broken: Exception | None = None
    while stop is None or at < stop:
        try:
            number, line = next(lines)
        except StopIteration:
            break
        except (*DAMAGE, OSError) as error:
            broken = error
            break
        at += len(line)
        _add_line(batch, line.removeprefix(_BOM) if begins and number == 1 else line, number, key)
        if batch.full or len(batch.bad) >= 1000:
            yield batch
            batch = Batch(source)
    yield batch
    if broken is not None:
        raise broken


def _add_line(batch: Batch, line: bytes, number: int, key: str) -> None:
    batch.lines_read += 1
    if line.isspace():
        return
    try:
        batch.add(text_of(line, key), number)
    except BadText as error:
        batch.bad.append(Bad(number, str(error)))


def text_of(line: bytes, key: str) -> str:
    """The text of one JSON line.

    Raises:
        BadText: it has none.
    """
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadText(f"not JSON in UTF-8 ({error})") from None
    if not isinstance(record, dict):
        raise BadText("no JSON object")
    return _checked(record.get(key), key, record)


def _checked(text: Any, key: str, record: Iterable[str]) -> str:
    if isinstance(text, str):
        return text
    if key in record:
        raise BadText(f"{key!r} is {'null' if text is None else type(text).__name__}, not text")
    raise BadText(f"no text under {key!r} (it has {', '.join(map(repr, record)) or 'no keys'}); see --text-key")


def _read_parquet(source: Source, number: int, key: str, unit: Unit | None) -> Iterator[Batch]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    with source.open() as stream:
        try:
            # a buffer makes it read pages one by one, not a whole row group
            file = parquet.ParquetFile(stream, buffer_size=_BATCH_BYTES)
            _check_column(key, file.schema_arrow.names)
            groups = range(file.num_row_groups) if unit is None else range(unit.start, unit.stop)
            parts = file.iter_batches(batch_size=_ROWS, row_groups=list(groups), columns=[key], use_threads=False)
            yield from _rows((part.column(0) for part in parts), number, key)
        except (arrow.ArrowException, BadText) as error:
            yield Batch(number, bad=[Bad(None, f"no Parquet file with texts: {error}")])


def _read_arrow(source: Source, number: int, key: str) -> Iterator[Batch]:
    import pyarrow as arrow

    with opened(source) as stream:
        try:
            data = arrow.PythonFile(stream)
            try:  # the file format, with an index at its end, or else the stream format
                reader = arrow.ipc.open_file(data)
                parts = map(reader.get_batch, range(reader.num_record_batches))
            except (arrow.ArrowInvalid, io.UnsupportedOperation):
                data.seek(0)
                parts = reader = arrow.ipc.open_stream(data)
            _check_column(key, reader.schema.names)
            yield from _rows((part.column(key) for part in parts), number, key)
        except (arrow.ArrowException, BadText) as error:
            yield Batch(number, bad=[Bad(None, f"no Arrow file with texts: {error}")])


def _check_column(key: str, names: list[str]) -> None:
    if key not in names:
        raise BadText(f"no column {key!r} (it has {', '.join(map(repr, names))}); see --text-key")


def _rows(columns: Iterable[Any], source: int, key: str) -> Iterator[Batch]:
    import pyarrow as arrow

    batch, number = Batch(source), 0
    broken: Exception | None = None
    rest = iter(columns)
    while broken is None:
        try:
            column = next(rest, None)
        except (*DAMAGE, arrow.ArrowException, OSError) as error:  # what stands before the break comes first
            column, broken = None, error
        if column is None:
            break
        for value in column:
            number += 1
            batch.lines_read += 1
            try:
                batch.add(_checked(value.as_py(), key, (key,)), number)
            except BadText as error:
                batch.bad.append(Bad(number, str(error)))
            except UnicodeDecodeError as error:
                batch.bad.append(Bad(number, f"not UTF-8 ({error})"))
            if batch.full:
                yield batch
                batch = Batch(source)
    yield batch
    if broken is not None:
        raise broken
