"""Zstandard files as a stream of bytes. Refuses a file that ends inside a frame, which zstandard's reader does not."""

import io
from typing import IO, Any

_READ_BYTES = 1 << 18


class ZstdStream(io.RawIOBase):
    """Decompressed bytes of a file of one or more frames."""

    def __init__(self, raw: IO[bytes]):
        """Begin to read.

        Raises:
            ValueError: the package zstandard is missing.
        """
        try:
            import zstandard
        except ImportError:
            raise ValueError("reading .zst needs a package: pip install zstandard") from None
        self._raw, self._new_frame, self._error = raw, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._frame: Any = None
        self._ready = b""

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
            self._ready = self._decompress(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        """What these bytes give; a frame may end in them and others follow."""
        found = b""
        try:
            while data:
                self._frame = self._frame or self._new_frame()
                found += self._frame.decompress(data)
                data = self._frame.unused_data if self._frame.eof else b""
                self._frame = None if self._frame.eof else self._frame
        except self._error as error:
            raise EOFError(str(error)) from None
        return found
