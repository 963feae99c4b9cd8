"""One conversion from its beginning to its certificate."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints_tools.certificate import NAME, certificate, compare
from checkpoints_tools.draft import Draft, plan_digest, refuse_full_disk, replace_file
from checkpoints_tools.errors import ConversionError
from checkpoints_tools.formats import FORMATS, open_any, written_formats
from checkpoints_tools.layout import Layout, Options
from checkpoints_tools.mover import Mover, Progress, digests, finish_files
from checkpoints_tools.opened import Opened, Weights
from checkpoints_tools.regions import Key
from megalemur.checkpoint.read_back import drop_from_memory
from megalemur.model.names import hf_shapes

_LAID_OUT = "megatron"
"""Formats whose files depend on a layout begin so."""


@dataclass(frozen=True)
class Request:
    """What is to be made of some weights, and where."""

    destination: Path
    format: str
    options: Options = field(default_factory=Options)
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What was changed on the way, for the certificate."""
    workers: int = 2
    resume: bool = False


@dataclass
class Outcome:
    """What a conversion took."""

    bytes: int
    """Of tensors."""
    write_seconds: float
    """Until everything was on the disk."""
    verify_seconds: float
    """To read it back and compare."""
    left_out: tuple[str, ...] = ()
    """Kinds of optimizer state that the source has and the destination does not."""


def _no_progress(stage: str, total: int) -> Progress:
    return lambda count: None


def lay_out(weights: Weights, source: Opened, request: Request) -> Layout:
    """The destination, before anything is written.

    Raises:
        ConversionError: that format cannot be written, or not with these options.
    """
    format_ = FORMATS.get(request.format)
    if format_ is None or format_.lay_out is None:
        raise ConversionError(f"--to {request.format}: write one of {', '.join(written_formats())}")
    options = request.options
    if not request.format.startswith(_LAID_OUT) and (options.tensor, options.pipeline, options.chunks) != (1, 1, 1):
        raise ConversionError(f"--to {request.format} has no layout; leave out --tensor, --pipeline and --chunks")
    return format_.lay_out(weights, source, options)


def convert(
    weights: Weights,
    source: Opened,
    request: Request,
    *,
    others: Sequence[Opened] = (),
    progress: Callable[[str, int], Progress] = _no_progress,
) -> Outcome:
    """Write the weights, read them back, certify, and only then give the destination its name.

    Args:
        weights: what is written: the source's tensors, or those with changes laid over them.
        source: where they come from.
        request: what is wanted.
        others: more checkpoints that the weights are made of.
        progress: called with the name of a stage and its bytes; gets told of bytes that were dealt with.

    Raises:
        ConversionError: the destination is there, does not fit on the disk, or cannot be made of this.
        DamagedCheckpoint: a source cannot be read, or is not what it says.
        CertificateError: what was written is not what was read.
    """
    layout = lay_out(weights, source, request)
    sources = (source, *others)
    before = [fingerprint(one) for one in sources]
    draft = Draft(request.destination, plan_digest(layout, {"files": before, "changes": dict(request.changes)}))
    draft.open(resume=request.resume)
    try:
        refuse_full_disk(layout, draft)
        sizes = tensor_bytes(weights)
        total = sum(sizes[key] for unit in layout.units for key in unit)
        kept = sum(sizes[key] for number in draft.done for key in layout.units[number])
        began = time.monotonic()
        advance = progress("writing", total)
        advance(kept)
        Mover(weights, layout, draft).move(request.workers, advance)
        finish_files(layout, draft)
        middle = time.monotonic()
        changed = [str(one.path) for one, files in zip(sources, before, strict=True) if fingerprint(one) != files]
        if changed:
            raise ConversionError(
                f"{', '.join(changed)} changed while being read: remove {draft.folder} and convert again"
            )
        found = digests(draft)
        _verify(draft, request, weights, found, progress("verifying", total))
        end = time.monotonic()
        text = certificate(
            weights, found, source=_source(source, layout, request), destination=_destination(layout, request)
        )
        replace_file(draft.tree / NAME, text)
        draft.commit()
    finally:
        draft.close()
    return Outcome(total, middle - began, end - middle, left_out(source, layout))


def _verify(draft: Draft, request: Request, weights: Weights, expected: Mapping[Key, str], advance: Progress) -> None:
    for path in draft.tree.rglob("*"):
        if path.is_file():
            drop_from_memory(path)  # as far as the system complies, the bytes come from the disk
    written = open_any(draft.tree, name=request.format, model=weights.model)
    compare(expected, written, request.workers, advance)


def left_out(source: Opened, layout: Layout) -> tuple[str, ...]:
    """Kinds of state that are not taken along."""
    taken = {key.kind for unit in layout.units for key in unit}
    return tuple(sorted({key.kind for key in source.dtypes} - taken))


def _source(source: Opened, layout: Layout, request: Request) -> dict[str, Any]:
    return {
        "format": source.format,
        "path": str(source.path.absolute()),
        "step": source.facts.get("step"),
        "changes": dict(request.changes),
        "left_out": list(left_out(source, layout)),
        "notes": list(source.notes),
    }


def _destination(layout: Layout, request: Request) -> dict[str, Any]:
    options = request.options
    said: dict[str, Any] = {"format": layout.format, "files": len(layout.sizes), "bytes": sum(layout.sizes.values())}
    if layout.format.startswith(_LAID_OUT):
        said |= {name: getattr(options, name) for name in ("tensor", "pipeline", "chunks", "transformer_engine")}
    return said


def tensor_bytes(weights: Weights) -> dict[Key, int]:
    """Of every tensor, as it is read."""
    shapes = hf_shapes(weights.model)
    return {key: math.prod(shapes[key.name]) * dtype.itemsize for key, dtype in weights.dtypes.items()}


def fingerprint(source: Opened) -> list[list[Any]]:
    """Size and time of every file that tensors are read from: a source that changes is another source."""
    files = sorted({region.file for found in source.regions.values() for region in found})
    stats = [(file, (source.path / file).stat()) for file in files]
    return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]
