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
_LARGEST_WINDOW = 1 << 31  # of zstd --long=31; memory is taken only where a file has such a window
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
"""What a damaged compressed file raises while it is read."""


_OPENERS = {"gzip": gzip.open, "xz": lzma.open, "bz2": bz2.open}


@contextmanager
def opened(source: Source) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed. One of DAMAGE, or OSError, may come while they are read, behind all good ones."""
    with source.open() as raw:
        if source.compression is None:
            yield raw
        elif source.compression == "zstd":
            yield io.BufferedReader(_Pieces(_zstd_pieces(raw)), _READ_BYTES)
        else:
            opener: Any = _OPENERS[source.compression]
            with opener(raw) as stream:
                # read1: unlike read, it does not go on until it meets the damage and then forget what came before
                yield io.BufferedReader(_Pieces(iter(lambda: stream.read1(_READ_BYTES), b"")), _READ_BYTES)


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a stream."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._ready = pieces, memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from one piece; 0 at the end."""
        while not self._ready:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._ready = memoryview(piece)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _zstd_pieces(raw: IO[bytes]) -> Iterator[bytes]:
    """Decompressed bytes of one or more frames. zstandard's own reader takes a file that ends inside a frame for whole.

    Raises:
        EOFError: the bytes are no whole frames.
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    frame: Any = None
    while data := raw.read(_READ_BYTES):
        while data:
            frame = frame or decompressor.decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends inside a frame")
