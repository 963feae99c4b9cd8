"""PREFIX.manifest.json: what made a data set, and what its files must be. Torch-free.

Refuses a manifest that does not belong to its files. It vouches for files whose size and time of change are those of
the last verification: that misses whoever changes bytes and sets the time back, and a disk that forgets;
`verify_index` reads every byte.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError, model_validator

from megalemur.config.plain_files import read_plain
from megalemur.data.errors import DamagedDataError
from megalemur.data.indexed import bin_path, idx_path

CHUNK_BYTES = 16 << 20
"""Bytes of a file that share a digest: how closely damage can be located."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(_Part):
    """What a file held when it was last written or verified."""

    bytes: NonNegativeInt
    """Size."""
    mtime_ns: NonNegativeInt
    """Time of change, ns since 1970."""
    xxh3_128: str
    """Digest of the whole file, hex; `xxhsum -H2` prints the same."""
    chunk_bytes: PositiveInt
    """Size of the chunks, the last one may be shorter."""
    chunks: tuple[str, ...]
    """xxh3-128 of each chunk, hex."""

    @model_validator(mode="after")
    def _every_byte_is_digested(self) -> "FileRecord":
        chunks = -(-self.bytes // self.chunk_bytes)
        if len(self.chunks) != chunks:
            raise ValueError(f"{len(self.chunks)} digests of chunks, but {self.bytes} bytes have {chunks}")
        return self

    def vouches(self, path: Path) -> bool:
        """Whether the file has the size and the time of change of this record."""
        try:
            now = path.stat()
        except OSError:
            return False
        return (now.st_size, now.st_mtime_ns) == (self.bytes, self.mtime_ns)


class TokenizerRecord(_Part):
    """What turned text into ids."""

    kind: Literal["sentencepiece", "huggingface"]
    """sentencepiece: a .model file. huggingface: a tokenizer.json."""
    sha256: str
    """Digest of that file, hex."""
    vocab_size: PositiveInt
    """Every id is below it."""
    bos_id: NonNegativeInt | None
    """Id of the beginning-of-document token; null: the tokenizer has none."""
    eos_id: NonNegativeInt | None
    """Id of the end-of-document token."""
    unk_id: NonNegativeInt | None
    """Id of the unknown token."""
    pad_id: NonNegativeInt | None
    """Id of the padding token."""


class InputRecord(_Part):
    """One input file, and what became of it."""

    name: str
    """Path or URL, as it was found."""
    bytes: NonNegativeInt | None
    """Size; null where it is not known, as for standard input."""
    mtime_ns: NonNegativeInt | None
    """Time of change; null where it is not known."""
    documents: NonNegativeInt
    """Documents written from it."""
    empty_documents: NonNegativeInt
    """Documents without text, left out."""
    bad: NonNegativeInt
    """Documents that could not be read, left out; listed in the manifest's bad."""
    tokens: NonNegativeInt
    """Tokens written from it."""
    text_bytes: NonNegativeInt
    """UTF-8 bytes of the text that became these tokens."""


class BadDocument(_Part):
    """A document that was left out."""

    where: str
    """file:line, or file."""
    reason: str
    """What is wrong there."""


class Origin(_Part):
    """How the data set came to be."""

    tool: str
    """The command: build_index, merge_index, split_index, deduplicate, decontaminate."""
    version: str
    """megalemur's."""
    arguments: Mapping[str, Any]
    """What the command was asked, paths as they were given."""
    facts: Mapping[str, Any] = {}
    """What it found: engine, threshold, removals and the like."""
    seconds: Mapping[str, float] = {}
    """Wall time by stage."""
    finished: str
    """When, ISO 8601 in UTC."""
    parents: tuple[str, ...] = ()
    """Digests of the data sets that it was made from."""


class Manifest(_Part):
    """PREFIX.manifest.json, version 1."""

    format: Literal[1] = 1
    """Version of this file's format."""
    kind: Literal["text"] = "text"
    """What a document is: plain text. (Chat, with an aligned file of loss masks and an index of packs, comes later.)"""
    tokenizer: TokenizerRecord
    prepend_bos: bool
    """Every document begins with the tokenizer's bos_id."""
    append_eos: bool
    """Every document ends with the tokenizer's eos_id."""
    dtype: str
    """numpy's name of the .bin's dtype."""
    documents: NonNegativeInt
    """Documents written."""
    tokens: NonNegativeInt
    """Tokens written, bos and eos counted."""
    unknown_tokens: NonNegativeInt
    """How many of them are unk_id."""
    control_strings: Mapping[str, NonNegativeInt] = {}
    """Names of control tokens that stand in the text, as text, and how often."""
    inputs: tuple[InputRecord, ...] = ()
    bad: tuple[BadDocument, ...] = ()
    part: tuple[NonNegativeInt, PositiveInt] | None = None
    """(number, of how many): one part of a data set that several machines build."""
    plan: str | None = None
    """Digest of what was to be built, equal for all parts of one data set."""
    digest: str
    """What the order of samples knows the data by (IndexedFile.digest)."""
    files: Mapping[Literal["bin", "idx"], FileRecord]
    origin: Origin

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text; 0 where it is not known."""
        return sum(one.text_bytes for one in self.inputs)

    @property
    def empty_documents(self) -> int:
        """Documents without text, left out."""
        return sum(one.empty_documents for one in self.inputs)

    def vouches(self, prefix: Path | str) -> bool:
        """Whether both files have the sizes and times of the last verification."""
        return self.files["bin"].vouches(bin_path(prefix)) and self.files["idx"].vouches(idx_path(prefix))

    def dump(self) -> bytes:
        """The manifest as it is written."""
        return self.model_dump_json(indent=1).encode() + b"\n"


class FileDigest:
    """Digests a file as it is written: as a whole, and chunk by chunk."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES):
        self._whole, self._chunk = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._chunk_bytes, self._in_chunk, self._chunks = chunk_bytes, 0, list[str]()
        self.bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes of the file."""
        view = memoryview(data).cast("B")
        self.bytes += len(view)
        self._whole.update(view)
        while len(view):
            part = view[: self._chunk_bytes - self._in_chunk]
            self._chunk.update(part)
            self._in_chunk += len(part)
            view = view[len(part) :]
            if self._in_chunk == self._chunk_bytes:
                self._close_chunk()

    def _close_chunk(self) -> None:
        self._chunks.append(self._chunk.hexdigest())
        self._chunk, self._in_chunk = xxhash.xxh3_128(), 0

    def record(self, path: Path) -> FileRecord:
        """The record of the file, which is written and closed."""
        if self._in_chunk:
            self._close_chunk()
        return FileRecord(
            bytes=self.bytes,
            mtime_ns=path.stat().st_mtime_ns,
            xxh3_128=self._whole.hexdigest(),
            chunk_bytes=self._chunk_bytes,
            chunks=tuple(self._chunks),
        )


def manifest_path(prefix: Path | str) -> Path:
    """The manifest of a prefix."""
    return Path(f"{prefix}.manifest.json")


def read_manifest(prefix: Path | str) -> Manifest | None:
    """The manifest of a data set, or None where nobody wrote one.

    Raises:
        DamagedDataError: not a manifest of version 1, or its sizes are not those of the files beside it.
    """
    path = manifest_path(prefix)
    try:
        manifest = Manifest.model_validate_json(read_plain(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedDataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DamagedDataError(f"{path}: {where}: {first['msg']}; build the data set again") from None
    for file, record in ((bin_path(prefix), manifest.files["bin"]), (idx_path(prefix), manifest.files["idx"])):
        if file.exists() and file.stat().st_size != record.bytes:
            raise DamagedDataError(
                f"{path}: says that {file.name} has {record.bytes} bytes, but it has {file.stat().st_size}; "
                "one of them belongs to another data set: build it again"
            )
    return manifest


def write_atomically(path: Path, parts: Iterable[bytes]) -> None:
    """Replace a file by one that is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
