"""Fills the pieces of the state of all ranks from a reader.

Compares the whole table of names and shapes, on every rank, before it reads a tensor.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from megalemur.checkpoint.errors import CheckpointError
from megalemur.checkpoint.exchange import Attempt, Peers
from megalemur.checkpoint.manifest import box_of_text, box_text
from megalemur.checkpoint.placement import refuse_problems
from megalemur.checkpoint.portions import Wanted
from megalemur.checkpoint.read import TensorReader
from megalemur.checkpoint.scatter import Scatter, Traffic
from megalemur.checkpoint.tensor_file import DTYPES
from megalemur.parallel.state import KINDS, Box, Piece


def load_pieces(
    reader: TensorReader,
    pieces: Sequence[Piece],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    group: dist.ProcessGroup | None = None,
) -> Traffic:
    """Write the stored values into every piece's tensor, on whatever device it lives.

    Every byte of every file is read once, by one of the ranks, and compared where it has a digest, also what no rank
    wants: it is a whole checkpoint or none. Until this has returned, the values may be anything.

    Moments are loaded when `pieces` has them and refused when the reader does not: nothing is dropped in silence.

    Args:
        reader: where from.
        pieces: what this rank holds.
        shapes: every tensor of the model, not of this rank only: all ranks compare the same whole table before reading.
        group: CPU process group, so that an error on one rank is raised on all. A collective over it.

    Returns:
        What this rank read and sent.

    Raises:
        CheckpointError: missing, extra, mis-shaped or mis-typed tensors, all listed with their files.
        DamagedCheckpoint: on every rank alike, when a byte is not what was written or cannot be read.
    """
    peers, doing = Peers(group), f"loading {reader.path}"
    attempt = Attempt()
    with attempt.step():
        refuse_table(reader, shapes)
        _refuse_pieces(reader, pieces, shapes)
    peers.raise_together(attempt.error, doing)
    wanted = _gather_claims(peers, reader, pieces, shapes)
    attempt = Attempt()
    scatter = Scatter(reader.stored_files(), peers, wanted, everything=True)
    with torch.no_grad():
        traffic = scatter.run(pieces, attempt)
    peers.raise_together(attempt.error, doing)
    return traffic


def _gather_claims(
    peers: Peers, reader: TensorReader, pieces: Sequence[Piece], shapes: Mapping[str, tuple[int, ...]]
) -> list[Wanted]:
    """What each rank wants. Refuses ranks that see other files at one place: their plans would not fit together."""
    names = sorted(shapes)
    numbers = {name: i for i, name in enumerate(names)}
    claims = [[numbers[p.name], KINDS.index(p.kind), box_text(p.box)] for p in pieces]
    said = peers.all_gather({"files": reader.fingerprint, "claims": claims})
    odd = [rank for rank, other in enumerate(said) if other["files"] != said[0]["files"]]
    if odd:
        raise CheckpointError(f"ranks {odd} see other files in {reader.path} than rank 0; do all mount the same disk?")
    wanted: list[Wanted] = []
    for other in said:
        found: dict[tuple[str, str], list[tuple[int, Box]]] = {}
        for piece, (name, kind, text) in enumerate(other["claims"]):
            found.setdefault((KINDS[kind], names[name]), []).append((piece, box_of_text(text)))
        wanted.append(found)
    return wanted


def refuse_table(reader: TensorReader, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what is offered with what the model wants; reads no tensor.

    Raises:
        CheckpointError: lists every difference.
    """
    refuse_problems(f"{reader.path} does not fit the model", list(_differences(reader, shapes)))


def _differences(reader: TensorReader, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in shapes.items():
        listed = reader.tensors.get(name)
        if listed is None:
            yield f"{name} is missing"
        elif listed.shape != tuple(shape):
            yield f"{name} in {listed.file.name} has shape {list(listed.shape)}, the model wants {list(shape)}"
        elif listed.dtype not in DTYPES:
            yield f"{name} in {listed.file.name} has dtype {listed.dtype}; only {', '.join(DTYPES)} can be loaded"
    for name, listed in reader.tensors.items():
        if name not in shapes:
            yield f"{name} in {listed.file.name} is no tensor of the model"


def _refuse_pieces(reader: TensorReader, pieces: Sequence[Piece], shapes: Mapping[str, tuple[int, ...]]) -> None:
    absent = sorted({piece.kind for piece in pieces} - reader.kinds)
    if absent:
        raise CheckpointError(
            f"{reader.path} holds {', '.join(sorted(reader.kinds))} and no {', '.join(absent)}; "
            "checkpoint.start_from and checkpoint.load=weights begin a new run with its weights alone"
        )
    for piece in pieces:
        if tuple(shapes.get(piece.name, ())) != tuple(piece.shape) or tuple(piece.tensor.shape) != piece.box.shape:
            raise CheckpointError(
                f"{piece.name} ({piece.kind}) {box_text(piece.box)} of shape {list(piece.shape)}, held as "
                f"{list(piece.tensor.shape)}: does not fit the model's shape {list(shapes.get(piece.name, ()))}"
            )
