"""Saves a checkpoint: every rank writes what it owns, the weights become Hugging Face files, one rename commits.

Two halves: `Planner.plan` agrees on who writes what, and `write_checkpoint` writes it, from the live tensors or from a
copy of them. An error on one rank is an error on all.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import xxhash

from megalemur.checkpoint.contents import Contents, problems_of, shared_digests
from megalemur.checkpoint.digests import FileEntry
from megalemur.checkpoint.draft import Draft, open_draft, sweep
from megalemur.checkpoint.errors import CheckpointError
from megalemur.checkpoint.exchange import Attempt, Peers
from megalemur.checkpoint.hf_files import INDEX, PieceReader, WeightFile, WeightGatherer, index_json, share_out
from megalemur.checkpoint.manifest import (
    ITEM_BYTES,
    STATE,
    Manifest,
    Stored,
    box_of_text,
    box_text,
    dump_manifest,
    rank_file,
    tensor_key,
)
from megalemur.checkpoint.placement import Claim, Placed, place, refuse_problems
from megalemur.checkpoint.tensor_file import TensorFileWriter, TensorSpec, offsets, write_bytes
from megalemur.config.strict_json import canonical_json, parse_json, readable_json
from megalemur.parallel.state import KINDS, MASTER

__all__ = ["Contents", "Planner", "SavePlan", "Sizes", "save_checkpoint", "write_checkpoint"]


class Sizes(NamedTuple):
    """How the Hugging Face weights are cut into files."""

    max_file_bytes: int
    """Largest file; a larger tensor has one of its own."""
    weight_files: int = 0
    """So many files at least, as near as whole tensors allow; 0: one a rank, where the model is large enough."""


class Written(NamedTuple):
    """A committed checkpoint."""

    path: Path
    manifest: Manifest


def save_checkpoint(
    root: Path, contents: Contents, *, group: dist.ProcessGroup | None, max_file_bytes: int, weight_files: int = 0
) -> Path:
    """Write `root/step_N`; returns it once it is complete and on the disk. A collective over `group`.

    A checkpoint of this step that is there already makes room: what the run holds now is its state at this step.

    Args:
        root: folder of the run's checkpoints, seen by all ranks.
        contents: what to write.
        group: CPU process group (gloo) over all ranks; None for a single process.
        max_file_bytes: see Sizes.
        weight_files: see Sizes.

    Raises:
        CheckpointError: on every rank alike, and nothing is committed: refused contents, or an error of any rank while
            writing.
    """
    peers = Peers(group)
    plan = Planner(peers, Sizes(max_file_bytes, weight_files)).plan(contents)
    return write_checkpoint(peers, root, plan, live_reader(contents)).path


def live_reader(contents: Contents) -> PieceReader:
    """Reads parts of this rank's state where it lives."""
    held = contents.held
    return lambda part: held[part.claim][part.box.relative_to(part.held).slices]


@dataclass(frozen=True)
class SavePlan:
    """What is written where; equal on all ranks. Holds no tensor and nothing that training changes."""

    step: int
    record: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    small_files: Mapping[str, bytes] = field(repr=False)
    """What rank 0 writes besides tensors, by path."""
    placed: Sequence[Placed] = field(repr=False)
    weights: Sequence[WeightFile] = field(repr=False)

    def own(self, rank: int) -> list[Placed]:
        """What a rank writes of the state, in the order of its file."""
        return [part for part in self.placed if part.rank == rank]


class Planner:
    """Agrees with the other ranks on who writes what, and remembers it: a run holds the same boxes at every save."""

    def __init__(self, peers: Peers, sizes: Sizes):
        self._peers, self._sizes = peers, sizes
        self._key = ""
        self._placed: list[Placed] = []
        self._weights: list[WeightFile] = []

    def plan(self, contents: Contents) -> SavePlan:
        """Refuse contents that are wrong or differ between ranks; else what is written where. A collective.

        Raises:
            CheckpointError: on every rank alike.
        """
        attempt = Attempt()
        shared: dict[str, str] = {}
        with attempt.step():
            refuse_problems("these contents cannot be saved", list(problems_of(contents)))
            shared = {**shared_digests(contents), "settings": repr(self._sizes)}
        self._peers.raise_together(attempt.error, "saving the checkpoint")
        claims = _claims_of(contents)
        key = shared["shapes or dtypes"] + xxhash.xxh3_128_hexdigest(canonical_json(claims))
        said = self._peers.all_gather({"shared": shared, "new": key != self._key})
        for part, digest in said[0]["shared"].items():
            odd = [rank for rank, other in enumerate(said) if other["shared"].get(part) != digest]
            if odd:
                raise CheckpointError(f"saving the checkpoint: ranks {odd} have other {part} than rank 0")
        if any(other["new"] for other in said):
            self._place(contents, claims)
            self._key = key
        files = {**contents.files, STATE: readable_json(contents.state)}
        if len(self._weights) > 1:
            files[INDEX] = index_json(self._weights)
        record = parse_json(canonical_json(contents.record))
        return SavePlan(contents.step, record, dict(contents.shapes), files, self._placed, self._weights)

    def _place(self, contents: Contents, claims: list[Any]) -> None:
        names = sorted(contents.shapes)
        held = [
            [Claim(names[i], KINDS[k], box_of_text(box)) for i, k, box in other]
            for other in self._peers.all_gather(claims)
        ]
        self._placed = place(held, contents.shapes)
        loads = [0] * self._peers.size
        for part in self._placed:
            loads[part.rank] += part.box.size * ITEM_BYTES
        specs = {name: TensorSpec(tuple(shape), contents.dtypes[name]) for name, shape in contents.shapes.items()}
        sizes = self._sizes
        self._weights = share_out(specs, sizes.max_file_bytes, loads, wanted_files=sizes.weight_files)


def _claims_of(contents: Contents) -> list[Any]:
    """The boxes this rank holds, as JSON: number of the name, number of the kind, box."""
    numbers = {name: i for i, name in enumerate(sorted(contents.shapes))}
    return [[numbers[p.name], KINDS.index(p.kind), box_text(p.box)] for p in contents.pieces]


def write_checkpoint(peers: Peers, root: Path, plan: SavePlan, read: PieceReader) -> Written:
    """Write what was planned and commit it. A collective over the peers; touches no device but through `read`.

    Raises:
        CheckpointError: on every rank alike, and nothing is committed.
    """
    draft, temporary = _begin(peers, root, plan.step)
    try:
        attempt = Attempt()
        entries = _write(peers, temporary, plan, read, attempt)
        peers.raise_together(attempt.error, "writing the checkpoint")
        manifest = _manifest(plan, _all_entries(peers, entries))
        attempt = Attempt()
        with attempt.step():
            if draft is not None:
                draft.commit(dump_manifest(manifest))
        peers.raise_together(attempt.error, "committing the checkpoint")
    except Exception:
        if draft is not None:
            draft.discard()
        raise
    return Written(root / temporary.name.split(".")[0], manifest)


def _begin(peers: Peers, root: Path, step: int) -> tuple[Draft | None, Path]:
    """Clear away what killed saves left, and create the temporary folder: both on rank 0; its path, on all ranks."""
    attempt, draft = Attempt(), None
    if peers.rank == 0:
        with attempt.step():
            sweep(root)
            draft = open_draft(root, step)
    peers.raise_together(attempt.error, "beginning the checkpoint")
    return draft, root / peers.all_gather(draft and draft.path.name)[0]


def _write(peers: Peers, temporary: Path, plan: SavePlan, read: PieceReader, attempt: Attempt) -> dict[str, FileEntry]:
    """This rank's share of all files; errors end up in `attempt`."""
    entries: dict[str, FileEntry] = {}
    own = plan.own(peers.rank)
    masters = [part for part in plan.placed if part.kind == MASTER]
    with ExitStack() as stack:
        state = None
        with attempt.step():
            if own:
                path = temporary / rank_file(peers.rank)
                state = stack.enter_context(TensorFileWriter(path, state_specs(own)))
                _write_state(state, own, read)
        entries |= WeightGatherer(peers, masters, read).write(temporary, plan.weights, attempt)
        with attempt.step():
            # only now: the disk went on with these bytes while the weights travelled
            if state is not None and attempt.error is None:
                entries[rank_file(peers.rank)] = state.finish()
        with attempt.step():
            stack.close()  # a network file system may say only now that it could not write
    with attempt.step():
        if peers.rank == 0:
            entries |= {name: write_bytes(temporary / name, data) for name, data in plan.small_files.items()}
    return entries


def _write_state(writer: TensorFileWriter, own: Sequence[Placed], read: PieceReader) -> None:
    """One rank file, piece by piece: nothing is gathered, one piece at a time is on the CPU."""
    for part, key in zip(own, state_specs(own), strict=True):
        held = read(part)
        tensor = held.cpu().contiguous()
        writer.write(key, tensor, passing=tensor is not held)


def state_specs(own: Iterable[Placed]) -> dict[str, TensorSpec]:
    """The tensors of a rank file."""
    return {tensor_key(p.name, p.kind, p.box): TensorSpec(p.box.shape, torch.float32) for p in own}


def _all_entries(peers: Peers, entries: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """Size and digests of every file of every rank."""
    said = peers.all_gather(entries)
    return {name: FileEntry(size, tuple(chunks)) for other in said for name, (size, chunks) in sorted(other.items())}


def _manifest(plan: SavePlan, files: Mapping[str, FileEntry]) -> Manifest:
    by_rank: dict[int, list[Placed]] = {}
    for part in plan.placed:
        by_rank.setdefault(part.rank, []).append(part)
    state: dict[str, dict[str, list[Stored]]] = {}
    for rank, own in sorted(by_rank.items()):
        starts = offsets(state_specs(own))
        for part in own:
            stored = Stored(part.box, rank_file(rank), starts[tensor_key(part.name, part.kind, part.box)])
            state.setdefault(part.kind, {}).setdefault(part.name, []).append(stored)
    placed = {kind: {name: tuple(sorted(found)) for name, found in tensors.items()} for kind, tensors in state.items()}
    return Manifest(plan.step, plan.record, files, dict(plan.shapes), placed)
