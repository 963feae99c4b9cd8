"""The manifest: what a checkpoint consists of and where each part of the state lies. Free of torch.

A tensor of a rank file is called `name|kind|box`, such as `model.norm.weight|exp_avg|0:64`. Paths are relative and
never leave the checkpoint.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import xxhash

from megalemur.checkpoint.cover import gap, inside, overlapping
from megalemur.checkpoint.errors import DamagedCheckpoint
from megalemur.config.strict_json import canonical_json, parse_json
from megalemur.parallel.boxes import Box

FORMAT, VERSION = "megalemur", 1
MANIFEST, STATE = "manifest.json", "trainer/state.json"


class FileEntry(NamedTuple):
    """Size in bytes and xxh3_128 (hexadecimal) of a file."""

    size: int
    digest: str


class Stored(NamedTuple):
    """Where a box of the state lies."""

    box: Box
    file: str


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    step: int
    record: Mapping[str, Any]
    """Layout, backend, optimizer, versions: facts about the run that wrote it."""
    files: Mapping[str, FileEntry]
    """Every file but the manifest, by relative path."""
    shapes: Mapping[str, tuple[int, ...]]
    """Every Hugging Face tensor of the model."""
    state: Mapping[str, Mapping[str, tuple[Stored, ...]]] = field(repr=False)
    """Kind to name to boxes, which cover each tensor exactly once."""


def rank_file(rank: int) -> str:
    """Path of the file with the state that a rank owns."""
    return f"trainer/rank-{rank:05d}.safetensors"


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
        "step": manifest.step,
        "record": manifest.record,
        "files": {path: {"bytes": entry.size, "xxh3_128": entry.digest} for path, entry in manifest.files.items()},
        "shapes": {name: list(shape) for name, shape in manifest.shapes.items()},
        "state": {
            kind: {name: [[box_text(box), file] for box, file in sorted(found)] for name, found in tensors.items()}
            for kind, tensors in manifest.state.items()
        },
    }
    return canonical_json({**body, "digest": _digest_of(body)})


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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(path, str(error)) from error
    return manifest


def _of_body(body: Mapping[str, Any]) -> Manifest:
    return Manifest(
        step=body["step"],
        record=body["record"],
        files={path: FileEntry(entry["bytes"], entry["xxh3_128"]) for path, entry in body["files"].items()},
        shapes={name: tuple(shape) for name, shape in body["shapes"].items()},
        state={
            kind: {
                name: tuple(Stored(box_of_text(text), file) for text, file in found) for name, found in tensors.items()
            }
            for kind, tensors in body["state"].items()
        },
    )


def _check(manifest: Manifest) -> None:
    for path in manifest.files:
        if not is_plain_path(path):
            raise ValueError(f"file name {path!r} does not stay inside the checkpoint")
    for kind, tensors in manifest.state.items():
        if tensors.keys() != manifest.shapes.keys():
            raise ValueError(f"{kind} is not there for exactly the tensors of the model")
        for name in tensors:
            _check_boxes(name, kind, manifest)


def _check_boxes(name: str, kind: str, manifest: Manifest) -> None:
    what, shape, found = f"{name} ({kind})", manifest.shapes[name], manifest.state[kind][name]
    boxes = [stored.box for stored in found]
    for box, file in found:
        if not inside(box, shape):
            raise ValueError(f"{what}: box {box_text(box)} lies outside shape {shape}")
        if file not in manifest.files:
            raise ValueError(f"{what}: file {file!r} is not in the list of files")
    for one, other in overlapping(boxes):
        raise ValueError(f"{what}: boxes {box_text(one)} and {box_text(other)} overlap")
    missing = gap(boxes, shape)
    if missing is not None:
        raise ValueError(f"{what}: {box_text(missing)} is nowhere")
