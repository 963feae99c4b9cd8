"""Compressed files as streams of bytes. Refuses a file that ends inside a frame: half a document is no document."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from data_prep.inputs import Source

_READ_BYTES = 1 << 18
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
"""What a damaged compressed file raises while it is read."""


@contextmanager
def opened(source: Source) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed. One of DAMAGE, or OSError, may come while they are read."""
    with source.open() as raw:
        if source.compression == "gzip":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield io.BufferedReader(stream, _READ_BYTES)
        elif source.compression == "xz":
            with lzma.LZMAFile(raw) as stream:
                yield io.BufferedReader(stream, _READ_BYTES)
        elif source.compression == "bz2":
            with bz2.BZ2File(raw) as stream:
                yield io.BufferedReader(stream, _READ_BYTES)
        elif source.compression == "zstd":
            yield io.BufferedReader(ZstdStream(raw), _READ_BYTES)
        else:
            yield raw


class ZstdStream(io.RawIOBase):
    """Decompressed bytes of a file of one or more frames."""

    def __init__(self, raw: IO[bytes]):
        import zstandard

        self._raw, self._new_frame, self._error = raw, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; 0 at the end.

        Raises:
            EOFError: the bytes are no whole frames.
        """
        while not self._ready:
            data = self._raw.read(_READ_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._ready = memoryview(self._decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        """What these bytes give; a frame may end in them and others follow."""
        found: list[bytes] = []
        try:
            while data:
                self._frame = self._frame or self._new_frame()
                found.append(self._frame.decompress(data))
                data = self._frame.unused_data if self._frame.eof else b""
                self._frame = None if self._frame.eof else self._frame
        except self._error as error:
            raise EOFError(str(error)) from None
        return b"".join(found)
