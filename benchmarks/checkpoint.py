"""What integrity costs: saves with digests and without, in the background, and beside cp; all in turns in one run.

    python benchmarks/checkpoint.py                       # 1 GB of state and weights, on 1, 2 and 4 gloo ranks
    python benchmarks/checkpoint.py --ranks 2 --rounds 31 --directory DIR
    python benchmarks/checkpoint.py --only digests        # more rounds of one comparison: digests or background
    python benchmarks/checkpoint.py hashes                # hash functions beside each other

A round takes one of each in turns; figures are medians over the rounds, ratios medians of the rounds' ratios: disks and
machines drift, pairs do not. cp copies a file of as many bytes from memory (tmpfs) to the same disk and syncs it. Its
time, and a save's, end when the bytes are on the disk. Reading back after the commit is a column of its own.
"""

import argparse
import hashlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from rich.console import Console
from rich.table import Table

from megalemur.checkpoint import digests, tensor_file
from megalemur.checkpoint.directory import open_manifest
from megalemur.checkpoint.exchange import Peers
from megalemur.checkpoint.read_back import drop_from_memory, read_back
from megalemur.checkpoint.save import Contents, save_checkpoint
from megalemur.checkpoint.saver import Saver
from megalemur.config.checkpoint import CheckpointConfig
from megalemur.config.model import ModelConfig
from megalemur.model.names import hf_shapes
from megalemur.parallel.state import KINDS, Owned, Segment, pieces_of, whole

console = Console(width=150)

MODEL = ModelConfig(
    num_layers=4, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=8, num_query_groups=8, vocab_size=9728
)
"""71 M parameters: 857 MB of masters and moments, 143 MB of bf16 weights."""


class SilentDigester(digests.ChunkDigester):
    """Counts bytes and reads none of them."""

    def update(self, data: bytes | memoryview) -> None:
        """Count."""
        self._size += len(data)

    def entry(self) -> digests.FileEntry:
        """As many digests as there are chunks."""
        return digests.FileEntry(self._size, ("0" * 32,) * -(-self._size // digests.CHUNK_BYTES))


@contextmanager
def without_digests() -> Iterator[None]:
    """Saves in this block digest nothing."""
    tensor_file.ChunkDigester = SilentDigester  # type: ignore[misc]
    try:
        yield
    finally:
        tensor_file.ChunkDigester = digests.ChunkDigester  # type: ignore[misc]


def contents_of(rank: int, ranks: int) -> Contents:
    """The state as the distributed optimizer deals it out: an even flat range of all parameters, cut anywhere."""
    shapes = hf_shapes(MODEL)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    first, last = total * rank // ranks, total * (rank + 1) // ranks
    owned, segments, position = [], {}, 0
    generator = torch.Generator().manual_seed(rank)
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        start, stop = max(first, position) - position, min(last, position + count) - position
        if start < stop:
            parameter = torch.nn.Parameter(torch.empty(0))
            segments[parameter] = [Segment(name, shape, whole(shape), 0)]
            tensors = {kind: torch.rand(stop - start, generator=generator) for kind in KINDS}
            owned.append(Owned(parameter, start, stop, tensors))
        position += count
    files = {"config.json": b"{}", "run.yaml": b"run: {}\n"}
    return Contents(1, pieces_of(owned, segments), shapes, dict.fromkeys(shapes, torch.bfloat16), files, {}, {})


class Bench:
    """One rank's part of all rounds."""

    def __init__(self, directory: Path, memory: Path):
        self.peers = Peers(dist.group.WORLD if dist.is_initialized() else None)
        self.directory, self.memory = directory, memory
        self.contents = contents_of(self.peers.rank, self.peers.size)
        settings = CheckpointConfig(directory=directory, read_back=False)
        group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.saver = Saver(settings, group)
        self.saver.prepare(self.contents)
        self.sizes = CheckpointConfig(directory=directory)

    def barrier(self) -> None:
        """Meet the other ranks."""
        if dist.is_initialized():
            dist.barrier()

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds until the slowest rank is through."""
        self.barrier()
        started = time.perf_counter()
        work()
        self.barrier()
        return time.perf_counter() - started

    def save(self) -> None:
        """A plain save."""
        group = self.peers.group
        self.path = save_checkpoint(
            self.directory, self.contents, group=group, max_file_bytes=self.sizes.max_file_bytes
        )

    def copy(self) -> None:
        """Cp from memory, on rank 0, and sync."""
        if self.peers.rank == 0:
            target = self.directory / "copy"
            subprocess.run(["cp", str(self.memory), str(target)], check=True)
            subprocess.run(["sync", str(target)], check=True)

    def clear(self) -> None:
        """Remove what was written and let the disk come to rest."""
        self.barrier()
        if self.peers.rank == 0:
            for path in self.directory.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.sync()
        self.barrier()

    def background(self) -> tuple[float, float]:
        """(seconds that training stands still, seconds until the checkpoint stands) of a background save."""
        self.barrier()
        started = time.perf_counter()
        self.saver.save(self.contents)
        blocked = time.perf_counter() - started
        self.saver.wait()
        self.saver.raise_last()
        self.barrier()
        return blocked, time.perf_counter() - started

    def reading(self, *, compare: bool) -> None:
        """Every chunk of the checkpoint's files on rank 0, from the disk as far as the kernel lets go of its pages."""
        if self.peers.rank:
            return
        manifest = open_manifest(self.path)
        buffer = memoryview(bytearray(digests.CHUNK_BYTES))
        for name, entry in manifest.files.items():
            path = self.path / name
            drop_from_memory(path)
            with path.open("rb", buffering=0) as file:
                for chunk in range(len(entry.chunks)):
                    data = buffer[: digests.read_at(file.fileno(), buffer, *entry.span(chunk))]
                    if compare:
                        digests.refuse_other_bytes(path, entry, chunk, data)

    def round(self, turn: int, only: str) -> dict[str, float]:
        """One of each, or of those compared; every other round in the opposite order."""
        seconds: dict[str, float] = {}

        def plain() -> None:
            with without_digests():
                seconds["save without digests"] = self.timed(self.save)

        def digested() -> None:
            seconds["save"] = self.timed(self.save)
            if only != "all":
                return
            seconds["read without digests"] = self.timed(lambda: self.reading(compare=False))
            seconds["read"] = self.timed(lambda: self.reading(compare=True))
            manifest = open_manifest(self.path)
            seconds["read back"] = self.timed(lambda: read_back(self.peers, self.path, manifest))

        def background() -> None:
            seconds["blocked"], seconds["background save"] = self.background()

        def copied() -> None:
            seconds["cp"] = self.timed(self.copy)

        compared = {"digests": [plain, digested], "background": [digested, background]}
        parts = compared.get(only, [plain, digested, copied, background])
        for part in parts if turn % 2 else reversed(parts):
            part()
            self.clear()
        return seconds


def rank_main(directory: Path, memory: Path, rounds: int, only: str) -> None:
    """One process of a group; rank 0 prints."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    bench = Bench(directory, memory)
    bench.round(0, only)  # first touches of memory, disk and connections are nobody's cost
    found = [bench.round(turn, only) for turn in range(rounds)]
    # blocked is each rank's own: the slowest holds up the step
    if only != "digests":
        blocked = bench.peers.all_gather([seconds["blocked"] for seconds in found])
        for turn, seconds in enumerate(found):
            seconds["blocked"] = max(own[turn] for own in blocked)
    if bench.peers.rank == 0:
        report(found, bench.peers.size, memory.stat().st_size)
    bench.barrier()


RATIOS = (
    ("save / save without digests", ("save",), ("save without digests",), "at most 1.05"),
    ("read / read without digests", ("read",), ("read without digests",), "at most 1.10"),
    ("blocked / save", ("blocked",), ("save",), "at most 0.15"),
    ("blocked / save and read back", ("blocked",), ("save", "read back"), ""),
    ("save's throughput / cp's", ("cp",), ("save",), "at least 0.70"),
)
"""Name, times of the numerator, of the denominator, bar."""


def report(found: list[dict[str, float]], ranks: int, size: int) -> None:
    """Medians, and ratios with the interval that holds their true median in 95 of 100 runs (order statistics)."""
    title = f"{ranks} ranks, {size / 1e9:.2f} GB, {len(found)} rounds, load {os.getloadavg()[0]:.1f}"
    table = Table(title=title, title_justify="left")
    for column in ("", "median", "95 % interval", "quartiles", "bar"):
        table.add_column(column)
    for name in found[0]:
        values = sorted(seconds[name] for seconds in found)
        table.add_row(name, f"{statistics.median(values):.3f} s", *_spread(values), "")
    for name, above, below, bar in RATIOS:
        if not all(part in found[0] for part in (*above, *below)):
            continue
        values = sorted(sum(s[part] for part in above) / sum(s[part] for part in below) for s in found)
        table.add_row(name, f"{statistics.median(values):.3f}", *_spread(values), bar)
    console.print(table)


def _spread(values: list[float]) -> tuple[str, str]:
    n = len(values)
    half = round(0.98 * n**0.5)
    low, high = max(0, (n - 1) // 2 - half), min(n - 1, n // 2 + half)
    return f"{values[low]:.3f} to {values[high]:.3f}", f"{values[n // 4]:.3f} to {values[3 * n // 4]:.3f}"


def group(ranks: int, rounds: int, directory: Path | None, only: str) -> None:
    """Start the processes of one group and wait for them."""
    scratch = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=directory))
    memory = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir="/dev/shm"))
    size = sum(torch.Size(shape).numel() for shape in hf_shapes(MODEL).values()) * 14
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        (memory / "bytes").write_bytes(np.random.default_rng(0).bytes(size))
        command = [sys.executable, "-W", "ignore", __file__, "rank", "--rounds", f"{rounds}", "--only", only]
        command += ["--directory", str(scratch), "--memory", str(memory / "bytes")]
        world = {"WORLD_SIZE": f"{ranks}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen(command, env={**os.environ, **world, "RANK": f"{rank}"}) for rank in range(ranks)]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"the ranks ended with {codes}")
    finally:
        shutil.rmtree(scratch)
        shutil.rmtree(memory)


def compare_digests() -> None:
    """GB/s of hash functions on 256 MiB in memory, one core."""
    data = np.random.default_rng(0).bytes(256 << 20)
    functions: dict[str, Callable[[bytes], object]] = {
        "xxh3-128": lambda d: xxhash.xxh3_128(d).digest(),
        "SHA-256": lambda d: hashlib.sha256(d).digest(),
        "BLAKE2b": lambda d: hashlib.blake2b(d).digest(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(9):
        for name, function in functions.items():
            started = time.perf_counter()
            function(data)
            seconds[name].append(time.perf_counter() - started)
    for name, found in seconds.items():
        console.print(f"{name}: {len(data) / statistics.median(found) / 1e9:.2f} GB/s")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("role", nargs="?", choices=("all", "hashes", "rank"), default="all")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("all", "digests", "background"), default="all")
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "rank":
        rank_main(args.directory, args.memory, args.rounds, args.only)
    elif args.role == "hashes":
        compare_digests()
    else:
        for ranks in args.ranks:
            group(ranks, args.rounds, args.directory, args.only)


if __name__ == "__main__":
    main()
