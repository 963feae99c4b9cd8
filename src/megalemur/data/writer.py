"""Writes indexed files in constant memory: nothing appears under the final names before everything is on the disk."""

import glob
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

import numpy as np

from megalemur.data.indexed import (
    HEADER,
    INTEGER_DTYPES,
    MAGIC,
    VERSION,
    IndexedFile,
    bin_path,
    idx_path,
    optimal_dtype,
)
from megalemur.data.manifest import FileDigest, FileRecord, Manifest, manifest_path, sync

_LONGEST = np.iinfo(np.int32).max
_BUFFER_BYTES = 1 << 20
_BLOCK = 1 << 20  # documents whose part of the index is made at once


class Written(NamedTuple):
    """What a manifest has to know of the files it is for."""

    documents: int
    tokens: int
    dtype: str
    digest: str
    """IndexedFile.digest of the files."""
    files: Mapping[Literal["bin", "idx"], FileRecord]


class IndexedWriter:
    """Writes one .bin and .idx pair, in constant memory.

    A context manager: an exception inside it leaves no file behind, and `commit` is what makes the files appear.
    """

    def __init__(self, prefix: Path | str, *, vocab_size: int, scratch: Path | None = None):
        """Open temporary files.

        Args:
            prefix: path without the ending; its directory is made.
            vocab_size: ids are 0 <= id < vocab_size; chooses the dtype.
            scratch: directory for them, on the same file system, emptied first; None: one beside the final files.
        """
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.dtype = optimal_dtype(vocab_size)
        self.num_tokens = self.num_documents = 0
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = scratch or own_scratch(self.prefix)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        self._temporary = self._scratch / self.prefix.name
        self._stream = bin_path(self._temporary).open("wb", buffering=_BUFFER_BYTES)
        self._lengths = (self._scratch / "lengths").open("w+b", buffering=_BUFFER_BYTES)
        self._digest = FileDigest()

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self._stream, self._lengths):
            try:
                stream.close()
            except OSError:  # a full disk, said already by the write that met it
                stream.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def add(self, tokens: np.ndarray | Sequence[int]) -> None:
        """Append one document.

        Raises:
            ValueError: it is empty, longer than the format can say, or holds an id outside the vocabulary.
        """
        tokens = np.asarray(tokens)
        where = f"{self.prefix}: document {self.num_documents}"
        if tokens.size == 0:
            raise ValueError(f"{where} has no tokens; leave it out")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{where} is {tokens.dtype}{list(tokens.shape)}; a document is a row of integers")
        if tokens.size > _LONGEST:
            raise ValueError(f"{where} has {tokens.size} tokens, the format ends at {_LONGEST}; split it")
        self.add_many(tokens, np.array([tokens.size], np.int32))

    def add_many(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: ids of all of them, one after another.
            lengths: tokens of each, int32, at least 1.

        Raises:
            ValueError: an id is outside the vocabulary, or the lengths do not add up.
        """
        self._check_ids(tokens)
        self._count(lengths, tokens.size)
        data = np.ascontiguousarray(tokens, self.dtype).data
        self._stream.write(data)
        self._digest.update(data)

    def add_extent(self, file: int, start: int, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents that lie in another file in the right dtype: the kernel copies, or shares, the bytes.

        Args:
            file: its descriptor.
            start: first byte in it.
            tokens: the same bytes, mapped: they are checked and digested.
            lengths: tokens of each document.

        Raises:
            ValueError: as `add_many`.
        """
        assert tokens.dtype == self.dtype
        self._check_ids(tokens)
        self._count(lengths, tokens.size)
        self._stream.flush()
        if _copy_range(file, self._stream.fileno(), start, tokens.nbytes):
            self._stream.seek(0, os.SEEK_END)
        else:
            self._stream.write(tokens.data)
        self._digest.update(tokens.data)

    def _check_ids(self, tokens: np.ndarray) -> None:
        if not tokens.size:
            return
        # one walk over unsigned ids: there is nothing below zero
        low, high = 0 if tokens.dtype.kind == "u" else int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"{self.prefix}: document {self.num_documents} or one soon behind it holds token id "
                f"{low if low < 0 else high}, outside the vocabulary of {self.vocab_size}; "
                "the tokenizer and the vocabulary size do not belong together"
            )

    def _count(self, lengths: np.ndarray, tokens: int) -> None:
        if (lengths.size and int(lengths.min()) < 1) or int(lengths.sum(dtype=np.int64)) != tokens:
            raise ValueError(f"{self.prefix}: {len(lengths)} lengths that are no lengths of {tokens} tokens")
        self._lengths.write(np.ascontiguousarray(lengths, "<i4").data)
        self.num_documents += len(lengths)
        self.num_tokens += tokens

    def commit(self, manifest: Callable[[Written], Manifest] | None = None) -> None:
        """Make the data set appear, replacing an older one; the .idx is last, and without it nothing can be opened.

        Args:
            manifest: makes PREFIX.manifest.json of what was written; None leaves no manifest.
        """
        self._stream.flush()
        os.fsync(self._stream.fileno())
        index = self._write_index(idx_path(self._temporary))
        names = {"bin": bin_path, "manifest": manifest_path, "idx": idx_path}
        if manifest is None:
            del names["manifest"]
        else:
            files: dict[Literal["bin", "idx"], FileRecord] = {
                "bin": self._digest.record(bin_path(self._temporary)),
                "idx": index,
            }
            digest = IndexedFile(self._temporary).digest  # also reads the index as everyone else will
            written = Written(self.num_documents, self.num_tokens, self.dtype.name, digest, files)
            manifest_path(self._temporary).write_bytes(manifest(written).dump())
            sync(manifest_path(self._temporary))
        for path in (idx_path(self.prefix), manifest_path(self.prefix)):
            path.unlink(missing_ok=True)
        for path_of in names.values():
            path_of(self._temporary).replace(path_of(self.prefix))
        sync(self.prefix.parent)

    def _write_index(self, path: Path) -> FileRecord:
        code = {dtype: code for code, dtype in INTEGER_DTYPES.items()}[self.dtype.str]
        digest = FileDigest()
        with path.open("wb") as stream:
            for data in self._index_parts(code):
                stream.write(data)
                digest.update(data)
            stream.flush()
            os.fsync(stream.fileno())
        return digest.record(path)

    def _index_parts(self, code: int) -> Iterator[bytes | memoryview]:
        """The .idx from its beginning: three walks over the lengths, for they are its three columns."""
        count = self.num_documents
        yield HEADER.pack(MAGIC, VERSION, code, count, count + 1)
        for lengths in self._all_lengths():
            yield lengths.data
        at = 0
        for lengths in self._all_lengths():
            ends = np.cumsum(lengths, dtype=np.int64)  # int64 throughout: 40 B tokens and more overflow nothing
            pointers = (ends - lengths + at) * self.dtype.itemsize
            at += int(ends[-1])
            yield pointers.astype("<i8", copy=False).data
        for first in range(0, count + 1, _BLOCK):
            yield np.arange(first, min(first + _BLOCK, count + 1), dtype="<i8").data

    def _all_lengths(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while data := self._lengths.read(4 * _BLOCK):
            yield np.frombuffer(data, "<i4")


def own_scratch(prefix: Path) -> Path:
    """A name for this process; what processes of this machine left that were killed is removed."""
    mine = f".{prefix.name}.{socket.gethostname()}-"
    for left in prefix.parent.glob(f"{glob.escape(mine)}*.tmp"):
        pid = left.name.removeprefix(mine).removesuffix(".tmp")
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    return prefix.with_name(f"{mine}{os.getpid()}.tmp")


def _copy_range(source: int, target: int, start: int, count: int) -> bool:
    """Copy bytes inside the kernel to the target's position; False where that does not work, and nothing was copied."""
    done = 0
    while done < count:
        try:
            step = os.copy_file_range(source, target, count - done, offset_src=start + done)
        except OSError:
            if done:
                raise
            return False
        if step == 0:
            raise OSError(f"the file ended {count - done} bytes early while it was copied")
        done += step
    return True
