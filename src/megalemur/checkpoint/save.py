"""Saves a checkpoint: every rank writes what it owns, the weights become Hugging Face files, one rename commits.

Until that rename the directory is called `step_N.tmp-<nonce>` and nothing believes it. An error on one rank is an error
on all.
"""

import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from megalemur.checkpoint.cover import inside
from megalemur.checkpoint.digests import FileEntry
from megalemur.checkpoint.directory import open_manifest, step_directory, sync_directory
from megalemur.checkpoint.errors import CheckpointError, DamagedCheckpoint
from megalemur.checkpoint.exchange import Attempt, Peers
from megalemur.checkpoint.hf_files import INDEX, WeightFile, WeightGatherer, index_json, share_out
from megalemur.checkpoint.manifest import (
    MANIFEST,
    STATE,
    TRAINER,
    Manifest,
    Stored,
    box_of_text,
    box_text,
    dump_manifest,
    is_plain_path,
    rank_file,
    tensor_key,
)
from megalemur.checkpoint.placement import Claim, Placed, place, refuse_problems
from megalemur.checkpoint.tensor_file import DTYPE_NAMES, TensorFileWriter, TensorSpec, offsets, write_bytes
from megalemur.config.strict_json import canonical_json, readable_json
from megalemur.parallel.state import KINDS, MASTER, Piece

_RESERVED = re.compile(r"manifest\.json|trainer|.*\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of, as this rank sees it. Everything but `pieces` is the same on all ranks."""

    step: int
    """Optimizer steps taken."""
    pieces: Sequence[Piece]
    """The fp32 state this rank holds, on any device. Ranks may hold copies of the same boxes; each is written once."""
    shapes: Mapping[str, tuple[int, ...]]
    """Every Hugging Face tensor of the model, in the order of the files. The masters must cover each."""
    dtypes: Mapping[str, torch.dtype]
    """Width of each tensor in the Hugging Face files."""
    files: Mapping[str, bytes]
    """Further files of the top folder by name: config.json, generation_config.json, tokenizer, run.yaml."""
    state: Mapping[str, Any]
    """trainer/state.json: JSON values, finite numbers."""
    record: Mapping[str, Any]
    """Facts about the run for the manifest: layout, backend, optimizer, versions."""


def save_checkpoint(root: Path, contents: Contents, *, group: dist.ProcessGroup | None, max_file_bytes: int) -> Path:
    """Write `root/step_N`; returns it once it is complete and on the disk. A collective over `group`.

    Args:
        root: folder of the run's checkpoints, seen by all ranks.
        contents: what to write.
        group: CPU process group (gloo) over all ranks; None for a single process.
        max_file_bytes: largest Hugging Face weight file; a larger tensor has a file of its own.

    Raises:
        CheckpointError: on every rank alike, and nothing is committed: refused contents, a good checkpoint of this step
            that is already there, or an error of any rank while writing.
    """
    peers = Peers(group)
    placed = _agree(peers, contents, max_file_bytes)
    temporary = _begin(peers, root, contents.step)
    attempt = Attempt()
    plan = _Plan(contents, placed, _weight_files(contents, max_file_bytes, peers.size))
    entries = _write(peers, temporary, plan, attempt)
    try:
        files = _all_entries(peers, entries, attempt.error)
        attempt = Attempt()
        if peers.rank == 0:
            with attempt.step():
                _commit(temporary, step_directory(root, contents.step), _manifest(plan, files))
        peers.raise_together(attempt.error, "committing the checkpoint")
    except CheckpointError:
        if peers.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return step_directory(root, contents.step)


@dataclass(frozen=True)
class _Plan:
    """What is written where; equal on all ranks but for the pieces in `contents`."""

    contents: Contents
    placed: Sequence[Placed]
    weights: Sequence[WeightFile]

    @property
    def small_files(self) -> dict[str, bytes]:
        """What rank 0 writes besides tensors."""
        files = {**self.contents.files, STATE: readable_json(self.contents.state)}
        if len(self.weights) > 1:
            files[INDEX] = index_json(self.weights)
        return files


def _weight_files(contents: Contents, max_file_bytes: int, ranks: int) -> list[WeightFile]:
    specs = {name: TensorSpec(tuple(shape), contents.dtypes[name]) for name, shape in contents.shapes.items()}
    return share_out(specs, max_file_bytes, ranks)


def _agree(peers: Peers, contents: Contents, max_file_bytes: int) -> list[Placed]:
    """Refuse contents that are wrong or differ between ranks; else who writes what."""
    attempt = Attempt()
    shared: dict[str, str] = {}
    with attempt.step():
        refuse_problems("these contents cannot be saved", list(_problems(contents)))
        shared = _fingerprints(contents, max_file_bytes)
    peers.raise_together(attempt.error, "saving the checkpoint")
    names = sorted(contents.shapes)
    numbers = {name: i for i, name in enumerate(names)}
    claims = [[numbers[p.name], KINDS.index(p.kind), box_text(p.box)] for p in contents.pieces]
    said = peers.all_gather({"shared": shared, "claims": claims})
    for part, digest in said[0]["shared"].items():
        odd = [rank for rank, other in enumerate(said) if other["shared"].get(part) != digest]
        if odd:
            raise CheckpointError(f"saving the checkpoint: ranks {odd} have other {part} than rank 0")
    held = [[Claim(names[i], KINDS[k], box_of_text(box)) for i, k, box in other["claims"]] for other in said]
    return place(held, contents.shapes)


def _problems(contents: Contents) -> Iterator[str]:
    """What is wrong with this rank's contents."""
    for name in contents.shapes:
        if contents.dtypes.get(name) not in DTYPE_NAMES:
            yield f"{name}: export dtype {contents.dtypes.get(name)}; use fp32, bf16 or fp16"
    for name in contents.files:
        if not is_plain_path(name) or "/" in name or _RESERVED.fullmatch(name):
            yield f"file {name!r}: wants a plain name in the top folder that is not the manifest's or the weights'"
    for piece in contents.pieces:
        shape = contents.shapes.get(piece.name)
        what = f"{piece.name} ({piece.kind}) {box_text(piece.box)}"
        if shape is None or piece.kind not in KINDS:
            yield f"{what}: the model has no such tensor or state of this kind"
        elif tuple(piece.shape) != tuple(shape) or not inside(piece.box, shape):
            yield f"{what} of shape {list(piece.shape)}: the model's tensor has shape {list(shape)}"
        elif tuple(piece.tensor.shape) != piece.box.shape or piece.tensor.dtype != torch.float32:
            yield f"{what}: held as {piece.tensor.dtype} {list(piece.tensor.shape)}; wants fp32 of the box's shape"


def _fingerprints(contents: Contents, max_file_bytes: int) -> dict[str, str]:
    """Digests of what must be equal on all ranks, by the words used when it is not."""
    files = {name: xxhash.xxh3_128_hexdigest(data) for name, data in contents.files.items()}
    shapes = [[name, list(shape), str(contents.dtypes[name])] for name, shape in contents.shapes.items()]
    parts = {
        "step": contents.step,
        "max_file_bytes": max_file_bytes,
        "shapes or dtypes": shapes,
        "files": files,
        "trainer state": contents.state,
        "record": contents.record,
    }
    return {part: xxhash.xxh3_128_hexdigest(canonical_json(value)) for part, value in parts.items()}


def _begin(peers: Peers, root: Path, step: int) -> Path:
    """Create the temporary folder on rank 0; its path, on all ranks."""
    nonce = peers.all_gather(secrets.token_hex(4))[0]
    final = step_directory(root, step)
    temporary = final.with_name(f"{final.name}.tmp-{nonce}")
    attempt = Attempt()
    if peers.rank == 0:
        with attempt.step():
            _refuse_existing(final)
            (temporary / TRAINER).mkdir(parents=True)
    peers.raise_together(attempt.error, "beginning the checkpoint")
    return temporary


def _refuse_existing(final: Path) -> None:
    if not final.exists():
        return
    try:
        open_manifest(final)
    except DamagedCheckpoint:
        return  # _commit moves it aside
    raise CheckpointError(f"{final} already holds a checkpoint of this step; move it away or save elsewhere")


def _write(peers: Peers, temporary: Path, plan: _Plan, attempt: Attempt) -> dict[str, FileEntry]:
    """This rank's share of all files; errors end up in `attempt`."""
    held = {Claim(piece.name, piece.kind, piece.box): piece for piece in plan.contents.pieces}

    def read(part: Placed) -> torch.Tensor:
        return held[part.claim].tensor.detach()[part.box.relative_to(part.held).slices]

    entries = {}
    own = [part for part in plan.placed if part.rank == peers.rank]
    with attempt.step():
        if own:
            entries[rank_file(peers.rank)] = _write_state(temporary / rank_file(peers.rank), own, read)
    masters = [part for part in plan.placed if part.kind == MASTER]
    entries |= WeightGatherer(peers, masters, read).write(temporary, plan.weights, attempt)
    with attempt.step():
        if peers.rank == 0:
            entries |= {name: write_bytes(temporary / name, data) for name, data in plan.small_files.items()}
    return entries


def _write_state(path: Path, own: Sequence[Placed], read: Any) -> FileEntry:
    """One rank file, piece by piece: nothing is gathered, one piece at a time is on the CPU."""
    specs = _state_specs(own)
    with TensorFileWriter(path, specs) as writer:
        for part, key in zip(own, specs, strict=True):
            writer.write(key, read(part).cpu().contiguous())
        return writer.finish()


def _state_specs(own: Sequence[Placed]) -> dict[str, TensorSpec]:
    return {tensor_key(p.name, p.kind, p.box): TensorSpec(p.box.shape, torch.float32) for p in own}


def _all_entries(peers: Peers, entries: Mapping[str, FileEntry], error: Exception | None) -> dict[str, FileEntry]:
    """Size and digest of every file of every rank; raises on all ranks when one has failed."""
    peers.raise_together(error, "writing the checkpoint")
    said = peers.all_gather(entries)
    return {name: FileEntry(size, tuple(chunks)) for other in said for name, (size, chunks) in sorted(other.items())}


def _manifest(plan: _Plan, files: Mapping[str, FileEntry]) -> Manifest:
    starts: dict[int, dict[str, int]] = {}
    for rank in sorted({part.rank for part in plan.placed}):
        starts[rank] = offsets(_state_specs([part for part in plan.placed if part.rank == rank]))
    state: dict[str, dict[str, list[Stored]]] = {}
    for part in plan.placed:
        offset = starts[part.rank][tensor_key(part.name, part.kind, part.box)]
        stored = Stored(part.box, rank_file(part.rank), offset)
        state.setdefault(part.kind, {}).setdefault(part.name, []).append(stored)
    shapes = {name: tuple(shape) for name, shape in plan.contents.shapes.items()}
    placed = {kind: {name: tuple(found) for name, found in tensors.items()} for kind, tensors in state.items()}
    return Manifest(plan.contents.step, plan.contents.record, files, shapes, placed)


def _commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """The manifest, everything to the disk, then the one rename that makes it a checkpoint."""
    write_bytes(temporary / MANIFEST, dump_manifest(manifest))
    sync_directory(temporary / TRAINER)
    sync_directory(temporary)
    if final.exists():
        # it did not verify when this save began; kept for whoever wants to know why
        final.rename(final.with_name(temporary.name.replace(".tmp-", ".damaged-")))
    temporary.rename(final)
    sync_directory(final.parent)
