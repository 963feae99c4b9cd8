"""What comparing digests adds to a load: the same checkpoint, loaded by the same ranks with and without, in turns.

python benchmarks/checkpoint_load.py --megabytes 1000 --ranks 2
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from megalemur.checkpoint.load import load_pieces
from megalemur.checkpoint.portions import StoredFile
from megalemur.checkpoint.read import CheckpointReader
from megalemur.checkpoint.save import Contents, save_checkpoint
from megalemur.parallel.state import KINDS, Box, Piece
from tests.support.ranks import run_ranks

COLUMNS = 2048
MATRICES = 16


class LoadCost(NamedTuple):
    """Seconds of the slowest rank, one a pair."""

    with_digests: list[float]
    without: list[float]
    read_bytes: int
    """By all ranks in one load."""

    @property
    def ratio(self) -> float:
        """Median over the pairs of with / without."""
        return statistics.median(a / b for a, b in zip(self.with_digests, self.without, strict=True))


class Undigested(CheckpointReader):
    """The same checkpoint, nothing compared but what opening it compares."""

    def stored_files(self) -> list[StoredFile]:
        return [replace(file, entry=None) for file in super().stored_files()]


def shapes_of(megabytes: int) -> dict[str, tuple[int, ...]]:
    """Matrices whose fp32 masters and moments and bf16 weights take so many MB."""
    rows = megabytes * 1_000_000 // (MATRICES * COLUMNS * 14)
    return {f"model.layers.{i}.mlp.up_proj.weight": (rows, COLUMNS) for i in range(MATRICES)}


def pieces_of_rank(shapes: dict[str, tuple[int, ...]], rows: bool) -> list[Piece]:
    """An even share: rows, as the distributed optimizer holds them, or columns, as another layout would."""
    rank, size, pieces = dist.get_rank(), dist.get_world_size(), []
    for name, shape in shapes.items():
        axis = 0 if rows else 1
        start, stop = [0, 0], list(shape)
        start[axis], stop[axis] = (shape[axis] * r // size for r in (rank, rank + 1))
        box = Box(tuple(start), tuple(stop))
        pieces += [Piece(name, kind, shape, box, torch.rand(box.shape)) for kind in KINDS]
    return pieces


def measure_on_rank(root: Path, megabytes: int, pairs: int, rows: bool) -> LoadCost:
    """Save, then load in turns; each turn begins and ends on all ranks together."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    shapes, group = shapes_of(megabytes), dist.group.WORLD
    contents = Contents(
        step=1,
        pieces=pieces_of_rank(shapes, rows=True),
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, torch.bfloat16),
        files={"config.json": b"{}"},
        state={},
        record={},
    )
    path = save_checkpoint(root, contents, group=group, max_file_bytes=1 << 30)
    pieces, seconds, read = pieces_of_rank(shapes, rows), {True: [], False: []}, 0
    for number in range(2 * pairs + 2):
        digests = number // 2 % 2 == number % 2  # with, without, without, with …: a drift favours neither
        reader = (CheckpointReader if digests else Undigested)(path)
        dist.barrier()
        started = time.perf_counter()
        traffic = load_pieces(reader, pieces, shapes=shapes, group=group)
        dist.barrier()
        if number > 1:  # the first pair warms up
            seconds[digests].append(time.perf_counter() - started)
        read = traffic.read_bytes
    total = torch.tensor([read])
    dist.all_reduce(total)
    return LoadCost(seconds[True], seconds[False], int(total))


def measure(directory: Path, *, megabytes: int, ranks: int, pairs: int, rows: bool) -> LoadCost:
    """Cost of a load by `ranks` processes of a checkpoint of so many MB in `directory`, which is emptied again."""
    root = Path(tempfile.mkdtemp(dir=directory))
    try:
        return run_ranks(ranks, measure_on_rank, root, megabytes, pairs, rows, timeout=1200)[0]
    finally:
        shutil.rmtree(root)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument(
        "--directory", type=Path, default=Path("/dev/shm"), help="where the checkpoint lies for a while"
    )
    args = parser.parse_args()
    print(f"{args.megabytes} MB, {args.ranks} ranks, {os.cpu_count()} cores, files in {args.directory}")
    for rows, layout in ((True, "the layout that wrote it"), (False, "another layout")):
        cost = measure(args.directory, megabytes=args.megabytes, ranks=args.ranks, pairs=args.pairs, rows=rows)
        rate = cost.read_bytes / 1e9 / statistics.median(cost.with_digests)
        print(
            f"load in {layout}: {statistics.median(cost.with_digests):.3f} s with digests, "
            f"{statistics.median(cost.without):.3f} s without, ratio {cost.ratio:.3f}; {rate:.2f} GB/s"
        )


if __name__ == "__main__":
    main()
