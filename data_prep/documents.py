"""Text files as a stream of documents: JSON lines (one document a line) or plain text (one a file).

Refuses what is not UTF-8, not JSON, or lacks its text, naming file and line.
"""

import glob
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import orjson

from data_prep.zstd_stream import ZstdStream

_COMPRESSED = (".gz", ".zst")


def input_files(inputs: Sequence[str]) -> list[Path]:
    """All files that the inputs name: a file, a directory (with all below it) or a glob; sorted within each input.

    Raises:
        ValueError: an input names no file, or two inputs name the same one.
    """
    files: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found = [below for below in path.rglob("*") if not _hidden(below.relative_to(path))]
        else:
            found = [path] if path.exists() else [Path(match) for match in glob.glob(text, recursive=True)]
        matched = sorted(one for one in found if one.is_file())
        if not matched:
            raise ValueError(f"--input {text}: no such file; give a file, a directory with files, or a quoted glob")
        files += matched
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise ValueError(f"--input: {file} is named more than once; its documents would count double")
        seen.add(file.resolve())
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed by its ending."""
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield io.BufferedReader(stream)
        elif path.suffix == ".zst":
            yield io.BufferedReader(ZstdStream(raw))
        else:
            yield raw


def _text_of(line: bytes, key: str, where: str) -> str:
    """The text of one JSON line."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON in UTF-8 ({error}); mend or remove the line") from None
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        there = f"it has {', '.join(map(repr, record)) or 'no keys'}" if isinstance(record, dict) else "no JSON object"
        raise ValueError(f"{where}: no text under {key!r} ({there}); name the right one with --text-key")
    return record[key]


def _plain_text(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8; convert the file, or "
            "leave it out"
        ) from None


def read_documents(files: Iterable[Path], text_key: str) -> Iterator[str]:
    """The documents of the files, in order; lines of white space in JSON lines are passed over.

    Args:
        files: .jsonl is JSON lines, everything else one document; .gz and .zst are decompressed first.
        text_key: key of the text in a JSON line.

    Raises:
        ValueError: file:line, what is wrong there, and what to do.
    """
    for path in files:
        name = path.with_suffix("") if path.suffix in _COMPRESSED else path
        try:
            with _opened(path) as stream:
                if name.suffix != ".jsonl":
                    yield _plain_text(stream.read(), path)
                    continue
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield _text_of(line, text_key, f"{path}:{number}")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: cannot be decompressed ({error}); copy it again, or leave it out") from None
