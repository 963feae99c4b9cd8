"""Artefacts that try to run code, to reach other files, or to keep a reader busy; and a canary that tells."""

import io
import json
import os
import pickle
import signal
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 10
"""Far more than a refusal takes: it is there for readers that never come back."""


class _Payload:
    def __init__(self, canary: Path):
        self._canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._canary}",)


def pickle_of(canary: Path) -> bytes:
    """A pickle that creates the canary when it is opened."""
    return pickle.dumps(_Payload(canary))


def pickle_of_chunks(count: int, protocol: int) -> bytes:
    """Nothing malicious: the metadata of a distributed checkpoint with one tensor of so many chunks, as torch's own."""
    import torch
    from torch.distributed.checkpoint import metadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    chunks = [metadata.ChunkStorageMetadata(torch.Size((n, 0)), torch.Size((1, 64))) for n in range(count)]
    places = {
        metadata.MetadataIndex("x", chunk.offsets, n): _StorageInfo("f", 1000 * n, 1000)
        for n, chunk in enumerate(chunks)
    }
    tensor = metadata.TensorStorageMetadata(
        metadata.TensorProperties(dtype=torch.float32), torch.Size((count, 64)), chunks
    )
    return pickle.dumps(metadata.Metadata({"x": tensor}, None, places, metadata.StorageMeta()), protocol=protocol)


def run_pickle(data: bytes) -> None:
    """Open a pickle as Python does, to show that it does what it is made for."""
    pickle.loads(data)


def torch_file_of(canary: Path) -> bytes:
    """The same as torch.save writes it: a zip with a pickle inside."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_of(canary))
        archive.writestr("archive/version", "3\n")
    return data.getvalue()


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header: text as it is, everything else as JSON; `length` is what the file claims of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    """A tensor in such a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def nested(depth: int = 100_000) -> bytes:
    """JSON and YAML of so many brackets."""
    return b"[" * depth + b"]" * depth


def sparse(path: Path, size: int) -> None:
    """A file that claims to be large and takes no room."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def replace_by(path: Path, what: str) -> None:
    """Put something that is no plain file in a file's place."""
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "endless device":
        path.symlink_to("/dev/zero")
    elif what == "directory":
        path.mkdir()
    elif what == "link to nothing":
        path.symlink_to("nowhere")
    elif what == "link to itself":
        path.symlink_to(path.name)


SPECIAL = ("pipe", "endless device", "directory", "link to nothing", "link to itself")


@contextmanager
def patience() -> Iterator[None]:
    """An error where the body does not come back."""

    def give_up(number: int, frame: Any) -> None:
        raise AssertionError(f"still busy after {PATIENCE_SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def with_digest(body: Mapping[str, Any]) -> bytes:
    """A manifest with these fields and a digest that fits them."""
    import xxhash

    from megalemur.config.strict_json import canonical_json

    rest = {key: value for key, value in body.items() if key != "digest"}
    return canonical_json({**rest, "digest": xxhash.xxh3_128_hexdigest(canonical_json(rest))})
