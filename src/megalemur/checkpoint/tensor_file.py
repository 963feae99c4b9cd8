"""Writes one safetensors file as a stream: the header first, then tensor after tensor, digested on the way to the disk.

safetensors' own writer wants every tensor of the file in memory at once and gives no digest; a 10 GB file made of
gathered tensors must cost one tensor. The format: a length (8 bytes, little-endian), a JSON header, the tensors' bytes.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from megalemur.checkpoint import disk
from megalemur.checkpoint.digests import ChunkDigester, FileEntry, entry_of

WRITE_BYTES = 8 << 20
"""Bytes of one write, but for the last of a file: parallel file systems want 4 MiB and more."""

_START_BYTES = 32 << 20
"""The disk begins with so many bytes at a time while more are written."""

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that will be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFileWriter:
    """A safetensors file in the making: create it with all specs, `write` every tensor in their order, `finish`.

    As a context manager it closes the file; a file that was not written to its end has no entry and must not be used.
    No byte is copied: tensors wait as they are until WRITE_BYTES have come together.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]):
        self._waiting = dict(specs)
        self._digest = ChunkDigester()
        self._parts: list[memoryview] = []
        self._part_bytes = self._written = self._started = 0
        self._file = disk.create(path)
        self._digesting = ThreadPoolExecutor(1, thread_name_prefix="megalemur-digest")
        self._put(memoryview(header_bytes(specs)))

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._parts.clear()
        self._digesting.shutdown()
        disk.close(self._file)

    def write(self, name: str, tensor: torch.Tensor, *, passing: bool = False) -> None:
        """Append the next tensor: on CPU, contiguous, as its spec says.

        Args:
            name: of the tensor.
            tensor: must keep its values until the last one has been written.
            passing: nobody else holds the tensor. What waits of it is copied, so that the rest of its memory goes: two
                gathered tensors are never held at once.
        """
        expected = next(iter(self._waiting))
        assert name == expected, f"{name} written where the header has {expected}"
        spec = self._waiting.pop(name)
        assert (tuple(tensor.shape), tensor.dtype) == spec and tensor.is_contiguous()
        self._put(tensor.view(-1).view(torch.uint8).numpy().data, copy_rest=passing)
        if not self._waiting:
            self._flush()

    def finish(self) -> FileEntry:
        """Bring the file to the disk; its size and digests."""
        assert not self._waiting, f"{len(self._waiting)} tensors were announced and not written"
        self._flush()  # a file without tensors has its header
        disk.sync(self._file)
        return self._digest.entry()

    def _put(self, data: memoryview, *, copy_rest: bool = False) -> None:
        while data:
            part = data[: WRITE_BYTES - self._part_bytes]
            data = data[len(part) :]
            waits = self._part_bytes + len(part) < WRITE_BYTES
            self._parts.append(memoryview(bytes(part)) if copy_rest and waits else part)
            self._part_bytes += len(part)
            if self._part_bytes == WRITE_BYTES:
                self._flush()

    def _digest_parts(self, parts: Sequence[memoryview]) -> None:
        for part in parts:
            self._digest.update(part)

    def _flush(self) -> None:
        if self._parts:
            # digested while they are written, by a thread that a free core takes; both let go of the interpreter's lock
            digested = self._digesting.submit(self._digest_parts, tuple(self._parts))
            try:
                disk.write(self._file, self._parts)
            finally:
                digested.result()
        self._written += self._part_bytes
        self._parts.clear()
        self._part_bytes = 0
        if self._written - self._started >= _START_BYTES:
            disk.start_writing(self._file, self._started, self._written - self._started)
            self._started = self._written


def file_order(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The order inside a file: wide dtypes first, so that every tensor starts at a multiple of its element size."""
    return dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))


def write_bytes(path: Path, data: bytes) -> FileEntry:
    """Write a small file and bring it to the disk."""
    file = disk.create(path)
    try:
        disk.write(file, [data])
        disk.sync(file)
    finally:
        disk.close(file)
    return entry_of(data)


def offsets(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """First byte of each tensor in the file that these specs make."""
    position, found = len(header_bytes(specs)), {}
    for name, spec in specs.items():
        found[name] = position
        position += spec.bytes
    return found


def header_bytes(specs: Mapping[str, TensorSpec]) -> bytes:
    """What a file with these tensors, in this order, begins with."""
    # transformers refuses a file without this metadata
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in specs.items():
        end = position + spec.bytes
        table[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
