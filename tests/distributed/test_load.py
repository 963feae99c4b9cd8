"""Loading over gloo ranks: nothing is read twice, every single damaged chunk is found, memory does not grow."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalemur.checkpoint.directory import open_manifest
from megalemur.checkpoint.errors import CheckpointError, DamagedCheckpoint
from megalemur.checkpoint.exchange import Peers
from megalemur.checkpoint.load import load_pieces
from megalemur.checkpoint.opening import open_together
from megalemur.checkpoint.read import CheckpointReader, HuggingFaceReader
from megalemur.checkpoint.save import save_checkpoint
from megalemur.parallel.state import MASTER, Box, Piece, whole
from tests.support.chunks import use_chunks_of
from tests.support.ranks import run_ranks
from tests.unit.checkpoint.synthetic import SHAPES, assert_loaded, contents, pieces_at, whole_pieces

CHUNK = 256
Group = dist.ProcessGroup


def with_small_chunks(function: Callable[..., Any], *arguments: Any) -> Any:
    use_chunks_of(CHUNK)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return function(*arguments)


def boxes(split: str) -> list[tuple[str, Box]]:
    """Ways to hold the state: each rank all of it, columns, rows, or rank 0 alone."""
    rank, size, found = dist.get_rank(), dist.get_world_size(), []
    for name, shape in SHAPES.items():
        axis = len(shape) - 1 if split == "columns" else 0
        first, last = (shape[axis] * r // size for r in (rank, rank + 1))
        start, stop = [0] * len(shape), list(shape)
        start[axis], stop[axis] = (first, last) if split in ("columns", "rows") else (0, shape[axis])
        if split != "rank 0" or rank == 0:
            found.append((name, Box(tuple(start), tuple(stop))))
    return found


SPLITS = ("copies", "columns", "rows", "rank 0")


def save(root: Path, split: str, step: int = 5) -> Path:
    what = contents(pieces_at(boxes(split)), step)
    return save_checkpoint(root, what, group=dist.group.WORLD, max_file_bytes=600)


def load(path: Path, split: str) -> tuple[int, int, int]:
    """(bytes read by this rank, bytes sent, bytes of small files that rank 0 read for all)."""
    pieces = pieces_at(boxes(split), filled=False)
    reader = CheckpointReader(path, opened=open_together(path, Peers(dist.group.WORLD)))
    traffic = load_pieces(reader, pieces, shapes=SHAPES, group=dist.group.WORLD)
    assert_loaded(pieces)
    return *traffic, sum(map(len, reader.opened.held.values()))


def save_in_each_and_load_in_all(root: Path) -> dict[tuple[str, str], tuple[int, int, int]]:
    told = {}
    for step, split in enumerate(SPLITS):
        path = save(root, split, step)
        told |= {(split, other): load(path, other) for other in SPLITS}
    return told


@pytest.fixture(scope="module", params=[1, 2, 4])
def traffic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(ranks, root, what each rank said); bit-equality was checked on the ranks."""
    root = tmp_path_factory.mktemp("load")
    return request.param, root, run_ranks(request.param, with_small_chunks, save_in_each_and_load_in_all, root)


def test_every_byte_is_read_once_and_the_shares_are_even(traffic: Any) -> None:
    _, root, told = traffic
    for step, split in enumerate(SPLITS):
        files = [file for file in (root / f"step_{step:06d}").rglob("*") if file.name != "manifest.json"]
        total = sum(file.stat().st_size for file in files if file.is_file())
        for other in SPLITS:
            read = [report[split, other][0] for report in told]
            assert sum(read) + told[0][split, other][2] == total
            assert max(read) - min(read) <= 3 * CHUNK, "two shares, each even to a chunk"


def test_the_layout_that_wrote_it_receives_little(traffic: Any) -> None:
    ranks, _, told = traffic
    sent = {pair: sum(report[pair][1] for report in told) for pair in told[0]}
    if ranks == 1:
        assert set(sent.values()) == {0}
    else:
        # files differ by a header and the shares by a chunk: what lies beside the border travels
        assert sent["rows", "rows"] < sent["rows", "columns"] / 2
        assert sent["rows", "copies"] > (ranks - 1) * 0.99 * 12 * sum(whole(s).size for s in SHAPES.values())


def attempt(path: Path, split: str) -> tuple[str, str, str] | None:
    """(type, path, message) of the error of a load."""
    try:
        load(path, split)
    except DamagedCheckpoint as error:
        return type(error).__name__, str(error.path), error.reason
    return None


def damage_everything_in_turn(root: Path, split: str) -> int:
    """Flip a bit in every chunk of every file, one after the other; how many were found, equal on all ranks."""
    path, rank, found = save(root, "rows"), dist.get_rank(), 0
    entries = open_manifest(path).files
    for name, entry in entries.items():
        for chunk in range(len(entry.chunks)):
            start, stop = entry.span(chunk)
            flip(path / name, (start + stop) // 2, rank)
            said = attempt(path, split)
            flip(path / name, (start + stop) // 2, rank)
            assert said is not None and said[1] == str(path / name), said
            small = not name.endswith(".safetensors")
            # the header of a weight file may be what a flip makes senseless; it is read before the chunks
            assert small or f"[{start}, {stop})" in said[2] or (chunk < 2 and name.startswith("model")), said
            found += 1
    assert attempt(path, split) is None, "all flips were undone"
    return found


def flip(path: Path, position: int, rank: int) -> None:
    dist.barrier()
    if rank == 0:
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 4]))
    dist.barrier()


@pytest.mark.parametrize(("ranks", "split"), [(1, "copies"), (2, "columns"), (4, "rank 0")])
def test_every_damaged_chunk_of_every_file_is_found_on_all_ranks(ranks: int, split: str, tmp_path: Path) -> None:
    found = run_ranks(ranks, with_small_chunks, damage_everything_in_turn, tmp_path, split)
    assert len(set(found)) == 1 and found[0] > 25


def other_damage(root: Path) -> None:
    path, rank = save(root, "rows"), dist.get_rank()
    victim = path / "trainer" / "rank-00000.safetensors"
    good = victim.read_bytes()

    def change(what: Callable[[], Any], restore: bool = True) -> tuple[str, str, str] | None:
        reader = CheckpointReader(path)
        dist.barrier()
        if rank == 0:
            what()
        dist.barrier()
        try:
            load_pieces(reader, whole_pieces(filled=False), shapes=SHAPES, group=dist.group.WORLD)
            said = None
        except DamagedCheckpoint as error:
            said = type(error).__name__, str(error.path), error.reason
        dist.barrier()
        if rank == 0:
            victim.unlink(missing_ok=True)
            victim.write_bytes(good)
        dist.barrier()
        return said

    # all of it after the checkpoint was opened, when its size was right
    zeroed = change(lambda: victim.write_bytes(good[:CHUNK] + bytes(CHUNK) + good[2 * CHUNK :]))
    assert zeroed == ("DamagedCheckpoint", str(victim), f"bytes [{CHUNK}, {2 * CHUNK}) differ from those that were "
                      "written (xxh3_128)")  # fmt: skip
    cut = change(lambda: os.truncate(victim, len(good) - 1))
    assert cut is not None and "bytes instead of" in cut[2]
    gone = change(victim.unlink)
    assert gone is not None and gone[0] == "UnreadableCheckpoint" and "No such file" in gone[2]
    linked = change(lambda: (victim.rename(root / "elsewhere"), victim.symlink_to(root / "elsewhere")))
    assert linked is not None and "not a plain file" in linked[2]
    pipe = change(lambda: (victim.unlink(), os.mkfifo(victim)))
    assert pipe is not None and "not a plain file" in pipe[2]
    assert attempt(path, "rows") is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_happens_to_files_after_they_were_opened_is_found(ranks: int, tmp_path: Path) -> None:
    run_ranks(ranks, with_small_chunks, other_damage, tmp_path)


def load_where_one_rank_sees_other_files(root: Path) -> None:
    paths = [save(root / str(number), "rows", number) for number in (1, 2)]
    reader = CheckpointReader(paths[dist.get_rank() == 1])
    with pytest.raises(CheckpointError, match=r"ranks \[1\] see other files"):
        load_pieces(reader, [], shapes=SHAPES, group=dist.group.WORLD)


def test_ranks_that_see_other_files_are_refused(tmp_path: Path) -> None:
    run_ranks(2, with_small_chunks, load_where_one_rank_sees_other_files, tmp_path)


def load_hugging_face(path: Path, split: str) -> int:
    pieces = pieces_at(boxes(split), filled=False, kinds=[MASTER])
    reader = HuggingFaceReader(path)
    read, _ = load_pieces(reader, pieces, shapes=SHAPES, group=dist.group.WORLD)
    for piece in pieces:
        assert torch.equal(piece.tensor, reader.read(piece.name, MASTER, piece.box))
    return read


@pytest.mark.parametrize("split", SPLITS)
def test_files_of_other_programs_are_read_once_too(split: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    widths = [torch.float16, torch.float32, torch.bfloat16]
    # an odd number of fp16 elements: what follows begins at no multiple of four, and chunks would cut through elements
    weights = {name: torch.randn(shape).to(widths[i % 3]) for i, (name, shape) in enumerate(SHAPES.items())}
    save_file(weights, tmp_path / "model.safetensors")
    read = run_ranks(2, with_small_chunks, load_hugging_face, tmp_path, split)
    assert sum(read) == (tmp_path / "model.safetensors").stat().st_size
    assert max(read) - min(read) <= 2 * CHUNK


def peak_bytes_of_a_load(root: Path, megabytes: int) -> float:
    """Largest growth of this rank's memory while it loads a state of so many MB, in chunks."""
    dist.barrier()
    shapes = {f"w{i}": (megabytes * 256, 64) for i in range(16)}  # fp32: so many MiB together
    rank, size = dist.get_rank(), dist.get_world_size()

    def pieces() -> list[Piece]:
        # columns: what a rank wants of a chunk is never one run of bytes
        box = {name: Box((0, 64 * rank // size), (shape[0], 64 * (rank + 1) // size)) for name, shape in shapes.items()}
        return [
            Piece(n, MASTER, s, box[n], torch.full(box[n].shape, 1.0 + i)) for i, (n, s) in enumerate(shapes.items())
        ]

    dtypes = dict.fromkeys(shapes, torch.bfloat16)
    what = contents(pieces(), megabytes, shapes=shapes, dtypes=dtypes)
    path = save_checkpoint(root, what, group=dist.group.WORLD, max_file_bytes=1 << 30)
    waiting = pieces()
    for piece in waiting:
        piece.tensor.zero_()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident("VmHWM")
    load_pieces(CheckpointReader(path), waiting, shapes=shapes, group=dist.group.WORLD)
    assert all(bool((piece.tensor == 1.0 + i).all()) for i, piece in enumerate(waiting))
    return resident("VmHWM") - before


def resident(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_in_chunks(root: Path, megabytes: int) -> float:
    use_chunks_of(4 << 20)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return peak_bytes_of_a_load(root, megabytes) / (4 << 20)


def test_extra_memory_is_a_few_chunks_whatever_the_size(tmp_path: Path) -> None:
    """Two that are read, one that leaves, one that arrives; whatever the first load of a process needs on top."""
    for megabytes in (32, 128):
        peaks = run_ranks(2, peak_in_chunks, tmp_path, megabytes)
        assert max(peaks) < 5, (megabytes, peaks)
