"""The manifest: what a checkpoint consists of and where each part of the state lies. Free of torch.

Two parts: the weights, as Hugging Face reads them, and the trainer's state, which can be dropped while the weights stay
verifiable. A tensor of a rank file is called `name|kind|box`, such as `model.norm.weight|exp_avg|0:64`. Paths are
relative and never leave the checkpoint. docs/checkpoint-format.md has the format.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import xxhash

from megalemur.checkpoint.cover import gap, inside, overlapping
from megalemur.checkpoint.digests import CHUNK_BYTES, FileEntry
from megalemur.checkpoint.errors import DamagedCheckpoint
from megalemur.config.strict_json import canonical_json, parse_json
from megalemur.parallel.boxes import Box

FORMAT, VERSION = "megalemur", 1
MANIFEST, TRAINER = "manifest.json", "trainer"
STATE = f"{TRAINER}/state.json"
ITEM_BYTES = 4
"""The state is fp32."""


class Stored(NamedTuple):
    """Where a box of the state lies: row after row, fp32, little-endian."""

    box: Box
    file: str
    offset: int
    """First byte in the file."""

    @property
    def stop(self) -> int:
        """The byte behind the last."""
        return self.offset + self.box.size * ITEM_BYTES


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    step: int
    record: Mapping[str, Any]
    """Layout, backend, optimizer, versions: facts about the run that wrote it."""
    files: Mapping[str, FileEntry]
    """Every file but the manifest, by relative path; those of the trainer lie below trainer/."""
    shapes: Mapping[str, tuple[int, ...]]
    """Every Hugging Face tensor of the model."""
    state: Mapping[str, Mapping[str, tuple[Stored, ...]]] = field(repr=False)
    """Kind to name to boxes, which cover each tensor exactly once; empty once the trainer's part was dropped."""
    dropped: str = ""
    """Digest of the trainer's part that was dropped; empty while it is there."""


def rank_file(rank: int) -> str:
    """Path of the file with the state that a rank owns."""
    return f"{TRAINER}/rank-{rank:05d}.safetensors"


def is_trainers(path: str) -> bool:
    """Whether a file belongs to the part that can be dropped."""
    return path.startswith(f"{TRAINER}/")


def box_text(box: Box) -> str:
    """A box as `first:last,first:last`."""
    return ",".join(f"{a}:{b}" for a, b in zip(box.start, box.stop, strict=True))


def box_of_text(text: str) -> Box:
    """The box that `box_text` wrote."""
    if not re.fullmatch(r"\d{1,18}:\d{1,18}(,\d{1,18}:\d{1,18}){0,7}", text, re.ASCII):
        raise ValueError(f"{text!r} is not a box; one is written 0:16,0:128")
    ends = [part.split(":") for part in text.split(",")]
    return Box(tuple(int(a) for a, _ in ends), tuple(int(b) for _, b in ends))


def tensor_key(name: str, kind: str, box: Box) -> str:
    """Name of a part of the state inside a rank file."""
    return f"{name}|{kind}|{box_text(box)}"


def is_plain_path(text: str) -> bool:
    """Whether a relative path stays where it starts: no `..`, no backslash, not absolute, spelled one way."""
    path = PurePosixPath(text)
    return bool(path.parts) and not (
        path.is_absolute() or ".." in path.parts or "\\" in text or "\0" in text or str(path) != text
    )


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: one canonical spelling, with a digest over everything else in it."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "chunk_bytes": CHUNK_BYTES,
        "step": manifest.step,
        "record": manifest.record,
        "weights": {
            "files": _files_json(manifest, trainers=False),
            "shapes": {name: list(shape) for name, shape in manifest.shapes.items()},
        },
        "trainer": {"dropped": manifest.dropped} if manifest.dropped else _trainer_json(manifest),
    }
    return canonical_json({**body, "digest": _digest_of(body)})


def _trainer_json(manifest: Manifest) -> dict[str, Any]:
    state = {
        kind: {
            name: [[box_text(stored.box), stored.file, stored.offset] for stored in sorted(found)]
            for name, found in tensors.items()
        }
        for kind, tensors in manifest.state.items()
    }
    return {"files": _files_json(manifest, trainers=True), "state": state}


def _files_json(manifest: Manifest, *, trainers: bool) -> dict[str, Any]:
    return {
        path: {"bytes": entry.size, "root": entry.root, "chunks": list(entry.chunks)}
        for path, entry in manifest.files.items()
        if is_trainers(path) is trainers
    }


def without_trainer(manifest: Manifest) -> Manifest:
    """The manifest of the same checkpoint once its trainer/ is gone."""
    weights = {path: entry for path, entry in manifest.files.items() if not is_trainers(path)}
    return replace(manifest, files=weights, state={}, dropped=_digest_of(_trainer_json(manifest)))


def _digest_of(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(canonical_json(body))


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """The manifest in `data`; `path` is for messages.

    Raises:
        DamagedCheckpoint: any byte differs from what `dump_manifest` writes, or what it says contradicts itself.
    """
    try:
        body = parse_json(data)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError("not a manifest of megalemur")
        if body.get("version") != VERSION:
            raise ValueError(f"format version {body.get('version')!r}; this program reads version {VERSION}")
        stated = body.pop("digest", None)
        if stated != _digest_of(body) or data != canonical_json({**body, "digest": stated}):
            raise ValueError("its digest does not match: the file was changed or cut short after it was written")
        manifest = _of_body(body)
        _check(manifest)
        if canonical_json({**body, "digest": stated}) != dump_manifest(manifest):
            raise ValueError("it holds more or other fields than this format has")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(path, str(error)) from error
    return manifest


def _of_body(body: Mapping[str, Any]) -> Manifest:
    weights, trainer = body["weights"], body["trainer"]
    files = {**weights["files"], **trainer.get("files", {})}
    return Manifest(
        step=body["step"],
        record=body["record"],
        files={path: FileEntry(entry["bytes"], tuple(entry["chunks"])) for path, entry in files.items()},
        shapes={name: tuple(shape) for name, shape in weights["shapes"].items()},
        state={
            kind: {
                name: tuple(Stored(box_of_text(text), file, offset) for text, file, offset in found)
                for name, found in tensors.items()
            }
            for kind, tensors in trainer.get("state", {}).items()
        },
        dropped=trainer.get("dropped", ""),
    )


def _check(manifest: Manifest) -> None:
    for path, entry in manifest.files.items():
        if not is_plain_path(path) or path == MANIFEST:
            raise ValueError(f"file name {path!r} does not stay inside the checkpoint")
        if type(entry.size) is not int or entry.size < 0:
            raise ValueError(f"{path}: {entry.size!r} is no size")
        if len(entry.chunks) != -(-entry.size // CHUNK_BYTES) or not all(map(_is_digest, entry.chunks)):
            raise ValueError(f"{path}: {len(entry.chunks)} digests do not fit {entry.size} bytes")
    if manifest.dropped and not _is_digest(manifest.dropped):
        raise ValueError(f"{manifest.dropped!r} is no digest of a dropped part")
    if type(manifest.step) is not int or manifest.step < 0 or not isinstance(manifest.record, dict):
        raise ValueError(f"step {manifest.step!r} and record {manifest.record!r} are no step and no object")
    for name, shape in manifest.shapes.items():
        if not shape or not all(type(extent) is int and 0 < extent < 1 << 62 for extent in shape):
            raise ValueError(f"{name}: {list(shape)} is no shape")
    for kind, tensors in manifest.state.items():
        if tensors.keys() != manifest.shapes.keys():
            raise ValueError(f"{kind} is not there for exactly the tensors of the model")
        for name in tensors:
            _check_boxes(name, kind, manifest)
    _check_overlaps(manifest)


def _check_overlaps(manifest: Manifest) -> None:
    """Each byte of a file belongs to one box: readers look boxes up by their bytes."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for kind, tensors in manifest.state.items():
        for name, stored in tensors.items():
            for box, file, offset in stored:
                found.setdefault(file, []).append((offset, Stored(box, file, offset).stop, tensor_key(name, kind, box)))
    for file, places in found.items():
        for (_, stop, one), (start, _, other) in pairwise(sorted(places)):
            if start < stop:
                raise ValueError(f"{file}: {one} ends at byte {stop}, behind the first of {other} at {start}")


def _check_boxes(name: str, kind: str, manifest: Manifest) -> None:
    what, shape, found = f"{name} ({kind})", manifest.shapes[name], manifest.state[kind][name]
    boxes = [stored.box for stored in found]
    for stored in found:
        if not inside(stored.box, shape):
            raise ValueError(f"{what}: box {box_text(stored.box)} lies outside shape {shape}")
        if not is_trainers(stored.file) or stored.file not in manifest.files:
            raise ValueError(f"{what}: file {stored.file!r} is not in the list of the trainer's files")
        if type(stored.offset) is not int or stored.offset % ITEM_BYTES:
            raise ValueError(f"{what}: byte {stored.offset!r} of {stored.file} is no multiple of {ITEM_BYTES}")
        if stored.offset < 0 or stored.stop > manifest.files[stored.file].size:
            raise ValueError(f"{what}: bytes [{stored.offset}, {stored.stop}) lie outside {stored.file}")
    for one, other in overlapping(boxes):
        raise ValueError(f"{what}: boxes {box_text(one)} and {box_text(other)} overlap")
    missing = gap(boxes, shape)
    if missing is not None:
        raise ValueError(f"{what}: {box_text(missing)} is nowhere")


def _is_digest(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", text, re.ASCII) is not None
