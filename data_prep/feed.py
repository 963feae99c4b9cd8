"""Large compressed files and standard input, read once and cut into chunks of whole lines for the workers."""

from collections.abc import Iterator
from typing import IO, NamedTuple

from data_prep.inputs import Source
from data_prep.streams import DAMAGE, opened

CHUNK_BYTES = 8 << 20
"""Decompressed text that goes to a worker at once. Part of what a plan means: another size is another plan."""


class Chunk(NamedTuple):
    """Whole lines of a stream."""

    number: int
    data: bytes
    last: bool
    damage: str | None
    """Why the file cannot be read beyond this chunk."""


def chunks_of(source: Source) -> Iterator[Chunk]:
    """The chunks of a stream, at least one; where they are cut does not depend on how the bytes arrive."""
    number, damage = 0, None
    before: bytes | None = None
    pieces = _pieces(source)
    while True:
        try:
            data = next(pieces, None)
        except _Damaged as error:
            data, damage = None, str(error)
        if data is None:
            yield Chunk(number, before or b"", True, damage)
            return
        if before is not None:
            yield Chunk(number, before, False, None)
            number += 1
        before = data


class _Damaged(Exception):
    """The stream cannot be read any further."""


def _pieces(source: Source) -> Iterator[bytes]:
    rest, searched = bytearray(), CHUNK_BYTES - 1  # no end of a line stands between the two: a line may be endless
    error: str | None = None
    try:
        with opened(source) as stream:
            while part := _some(stream):
                rest += part
                while len(rest) >= CHUNK_BYTES and (end := rest.find(b"\n", searched) + 1):
                    yield bytes(rest[:end])
                    del rest[:end]
                    searched = CHUNK_BYTES - 1
                searched = max(searched, len(rest))
    except DAMAGE as damage:
        error = f"cannot be decompressed from here on ({damage})"
    except OSError as damage:
        error = f"cannot be read from here on ({damage.strerror or damage})"
    if error:  # half a line is part of the damage
        del rest[rest.rfind(b"\n") + 1 :]
    if rest:
        yield bytes(rest)
    if error:
        raise _Damaged(error)


def _some(stream: IO[bytes]) -> bytes:
    """What is there, up to a megabyte; unlike read(n), an error loses nothing of what came before it."""
    read1 = getattr(stream, "read1", None)
    return read1(1 << 20) if read1 else stream.read(1 << 20)
