"""Writes indexed files: nothing appears under the final names before everything is on the disk. numpy only."""

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from megalemur.data.indexed import HEADER, INTEGER_DTYPES, MAGIC, VERSION, bin_path, idx_path, optimal_dtype
from megalemur.data.manifest import manifest_path

_LONGEST = np.iinfo(np.int32).max


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class IndexedWriter:
    """Writes one .bin and .idx pair, document by document; memory is 4 bytes a document.

    A context manager: an exception inside it leaves no file behind, and `commit` is what makes the files appear.
    """

    def __init__(self, prefix: Path | str, *, vocab_size: int):
        """Open a temporary file beside the final one.

        Args:
            prefix: path without the ending; its directory is made.
            vocab_size: ids are 0 <= id < vocab_size; chooses the dtype.
        """
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.dtype = optimal_dtype(vocab_size)
        self.num_tokens = 0
        self._lengths = array("i")
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._final = {"bin": bin_path(prefix), "manifest": manifest_path(prefix), "idx": idx_path(prefix)}
        self._temporary = {
            kind: path.with_name(f".{path.name}.{os.getpid()}.tmp") for kind, path in self._final.items()
        }
        self._stream = self._temporary["bin"].open("wb")

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

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
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"{where} holds token id {low if low < 0 else high}, outside the vocabulary of {self.vocab_size}; "
                "the tokenizer and the vocabulary size do not belong together"
            )
        self._stream.write(tokens.astype(self.dtype).tobytes())
        self._lengths.append(tokens.size)
        self.num_tokens += tokens.size

    def commit(self, *, manifest: bytes | None = None) -> None:
        """Make the data set appear, replacing an older one; the .idx is last, and without it nothing can be opened.

        Args:
            manifest: contents of PREFIX.manifest.json; None leaves no manifest.
        """
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._write_index(self._temporary["idx"])
        if manifest is not None:
            self._temporary["manifest"].write_bytes(manifest)
            _sync(self._temporary["manifest"])
        self._final["idx"].unlink(missing_ok=True)
        self._final["manifest"].unlink(missing_ok=True)
        for kind in ("bin", "manifest", "idx"):
            if kind != "manifest" or manifest is not None:
                self._temporary[kind].replace(self._final[kind])
        _sync(self.prefix.parent)

    def _write_index(self, path: Path) -> None:
        lengths = np.frombuffer(self._lengths, np.int32).astype("<i4") if self._lengths else np.zeros(0, "<i4")
        pointers = np.zeros(len(lengths), "<i8")
        # int64 throughout: 40 B tokens and more overflow nothing
        np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
        pointers *= self.dtype.itemsize
        code = {dtype: code for code, dtype in INTEGER_DTYPES.items()}[self.dtype.str]
        with path.open("wb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
            for column in (lengths, pointers, np.arange(len(lengths) + 1, dtype="<i8")):
                stream.write(column.data)
            stream.flush()
            os.fsync(stream.fileno())
