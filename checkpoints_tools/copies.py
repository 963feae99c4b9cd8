"""Tensors that several files of a checkpoint hold: are the copies equal, bit for bit? Compared a block at a time."""

import os
from pathlib import Path

import torch

from checkpoints_tools.foreign import StoredTensor
from megalemur.checkpoint.digests import read_at
from megalemur.checkpoint.errors import DamagedCheckpoint, UnreadableCheckpoint
from megalemur.config.plain_files import open_plain

_BLOCK_BYTES = 4 << 20

Copy = tuple[Path, StoredTensor]
"""The file, and where it holds the tensor: row by row."""


def first_difference(one: Copy, other: Copy) -> int | None:
    """The first element, counted row by row, in which two tensors differ; None: in no bit.

    Tensors of two shapes or dtypes differ in element 0.

    Raises:
        UnreadableCheckpoint: a file cannot be read.
        DamagedCheckpoint: a file ends inside the tensor.
    """
    stored = one[1]
    if (stored.shape, stored.dtype) != (other[1].shape, other[1].dtype):
        return 0
    size = torch.Size(stored.shape).numel() * stored.dtype.itemsize
    for at in range(0, size, _BLOCK_BYTES):
        count = min(_BLOCK_BYTES, size - at)
        a, b = (torch.frombuffer(_bytes(copy, at, count), dtype=torch.uint8) for copy in (one, other))
        if not torch.equal(a, b):
            return (at + int((a != b).nonzero()[0])) // stored.dtype.itemsize
    return None


def _bytes(copy: Copy, at: int, count: int) -> bytearray:
    path, stored = copy
    data, first = bytearray(count), stored.offset + at
    try:
        file = open_plain(path)
        try:
            found = read_at(file, memoryview(data), first, first + count)
        finally:
            os.close(file)
    except OSError as error:
        raise UnreadableCheckpoint(path, f"cannot be read: {error.strerror}") from error
    if found < count:
        raise DamagedCheckpoint(path, f"ends at byte {first + found}, inside a tensor")
    return data
