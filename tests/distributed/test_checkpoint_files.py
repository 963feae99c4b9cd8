"""Checkpoints over four gloo ranks: any splitting to any other, each byte once, and one rank's error is everybody's."""

import resource
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalemur.checkpoint.directory import newest_checkpoint, verify_checkpoint
from megalemur.checkpoint.errors import CheckpointError, NoGoodCheckpoint
from megalemur.checkpoint.load import load_pieces
from megalemur.checkpoint.read import CheckpointReader, HuggingFaceReader
from megalemur.checkpoint.save import Contents, save_checkpoint
from megalemur.checkpoint.search import Search
from megalemur.parallel.state import MASTER, Box, Piece, whole
from tests.support.ranks import run_ranks
from tests.unit.checkpoint.synthetic import SHAPES, assert_loaded, contents, full_state, pieces_at

RANKS = 4


def with_a_group(function: Callable[..., None], *arguments: Any) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    function(*arguments)


def split(layout: str, rank: int) -> list[tuple[str, Box]]:
    """What a rank holds in some ways to spread the state over four ranks."""
    boxes = []
    for name, shape in SHAPES.items():
        rows, columns = shape[0], shape[-1]
        if layout == "replicas":
            boxes.append((name, whole(shape)))
        elif layout == "rows":
            boxes.append((name, Box((rows * rank // 4, *[0] * (len(shape) - 1)), (rows * (rank + 1) // 4, *shape[1:]))))
        elif layout == "columns and copies" and len(shape) == 2:
            # ranks 0, 1 share the columns, and so do 2, 3; vectors are on all four
            half = rank % 2
            boxes.append((name, Box((0, columns * half // 2), (rows, columns * (half + 1) // 2))))
        elif layout == "columns and copies":
            boxes.append((name, whole(shape)))
        elif layout == "stages":
            # rank 3 holds nothing; the embedding is tied: rows cut in one way on 0 and 1, in another on 2
            first = list(SHAPES).index(name)
            if first == 0:
                boxes += [(name, Box(a, b)) for a, b in {0: [((0, 0), (5, 8))], 1: [((5, 0), (24, 8))]}.get(rank, [])]
                boxes += [(name, Box((0, 0), (9, 8))), (name, Box((9, 0), (24, 8)))] if rank == 2 else []
            elif first % 3 == rank:
                boxes.append((name, whole(shape)))
    return boxes


LAYOUTS = ("replicas", "rows", "columns and copies", "stages")


def save(root: Path, what: Contents, max_file_bytes: int = 200) -> Path:
    return save_checkpoint(root, what, group=dist.group.WORLD, max_file_bytes=max_file_bytes)


def load_as(path: Path, layout: str) -> None:
    pieces = pieces_at(split(layout, dist.get_rank()), filled=False)
    load_pieces(CheckpointReader(path), pieces, shapes=SHAPES, group=dist.group.WORLD)
    assert_loaded(pieces)


def save_in_each_and_load_in_all(root: Path) -> None:
    for step, layout in enumerate(LAYOUTS):
        path = save(root, contents(pieces_at(split(layout, dist.get_rank())), step))
        for other in LAYOUTS:
            load_as(path, other)


def stored_elements(path: Path) -> Counter[tuple[str, str]]:
    """Elements in the rank files, by name and kind; a copy written twice counts twice."""
    counts: Counter[tuple[str, str]] = Counter()
    for file in path.glob("trainer/rank-*.safetensors"):
        from safetensors.torch import load_file

        for key, tensor in load_file(file).items():
            name, kind, _ = key.split("|")
            counts[name, kind] += tensor.numel()
    return counts


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    run_ranks(RANKS, with_a_group, save_in_each_and_load_in_all, root)
    return {layout: root / f"step_{step:06d}" for step, layout in enumerate(LAYOUTS)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_loaded_in_each_and_every_element_is_stored_once(layout: str, saved: dict[str, Path]) -> None:
    # bit-equality was checked on the ranks, when `saved` was made
    verify_checkpoint(saved[layout])
    wanted = {key: tensor.numel() for key, tensor in full_state().items()}
    assert stored_elements(saved[layout]) == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hugging_face_files_are_the_same_whatever_layout_wrote_them(layout: str, saved: dict[str, Path]) -> None:
    files = {file.name: file.read_bytes() for file in saved["replicas"].glob("model*")}
    assert len(files) > RANKS
    assert {file.name: file.read_bytes() for file in saved[layout].glob("model*")} == files
    reader, state = HuggingFaceReader(saved[layout]), full_state()
    for name, shape in SHAPES.items():
        assert torch.equal(reader.read(name, MASTER, whole(shape)), state[name, MASTER].bfloat16().float())


def test_copies_are_spread_over_the_ranks_that_hold_them(saved: dict[str, Path]) -> None:
    sizes = [file.stat().st_size for file in saved["replicas"].glob("trainer/rank-*.safetensors")]
    assert len(sizes) == RANKS and max(sizes) < 1.5 * min(sizes)
    assert not (saved["stages"] / "trainer" / "rank-00003.safetensors").exists()


def save_with_differences(root: Path) -> None:
    rank = dist.get_rank()
    pieces = pieces_at(split("rows", rank))
    good = contents(pieces)
    wrong = {
        r"ranks \[2\] have other trainer state": contents(pieces, state={"step": 5 + (rank == 2)}),
        r"ranks \[1, 3\] have other files": contents(pieces, files={"run.yaml": bytes([rank % 2])}),
        "held as torch.bfloat16": contents(pieces if rank != 2 else [as_bf16(pieces[0]), *pieces[1:]]),
        r"model\.norm\.weight \(exp_avg_sq\): no rank holds 6:8": contents(pieces if rank != 3 else pieces[:-1]),
    }
    for said, bad in wrong.items():
        with pytest.raises(CheckpointError, match=said):
            save(root, bad)
    assert not root.exists()
    save(root, good)


def as_bf16(piece: Piece) -> Piece:
    return Piece(piece.name, piece.kind, piece.shape, piece.box, piece.tensor.bfloat16())


def test_what_differs_between_ranks_is_refused_on_all(tmp_path: Path) -> None:
    run_ranks(RANKS, with_a_group, save_with_differences, tmp_path / "root")
    assert verify_checkpoint(tmp_path / "root" / "step_000005")


def save_where_one_rank_may_not_write(root: Path, failing: int) -> None:
    rank = dist.get_rank()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    good = contents(pieces_at(split("rows", rank)))
    if rank == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    with pytest.raises(CheckpointError, match=f"rank {failing}: OSError: .*File too large"):
        save(root, good)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()
    assert list(root.iterdir()) == []
    # the ranks are still in step with each other
    load_as(save(root, good), "columns and copies")


@pytest.mark.parametrize("failing", [0, 2])
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_nothing(failing: int, tmp_path: Path) -> None:
    run_ranks(RANKS, with_a_group, save_where_one_rank_may_not_write, tmp_path, failing)


def save_where_one_value_does_not_fit(root: Path) -> None:
    pieces = pieces_at(split("rows", dist.get_rank()))
    if dist.get_rank() == 1:
        pieces[0].tensor[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"rank 1: ValueError: model\.embed_tokens\.weight: values beyond"):
        save(root, contents(pieces, dtypes=dict.fromkeys(SHAPES, torch.float16)))


def test_a_sender_that_fails_keeps_no_writer_waiting(tmp_path: Path) -> None:
    run_ranks(RANKS, with_a_group, save_where_one_value_does_not_fit, tmp_path)
    assert list(tmp_path.iterdir()) == []


def load_where_one_rank_asks_for_too_much(path: Path) -> None:
    rank = dist.get_rank()
    pieces = pieces_at(split("rows", rank), filled=False)
    if rank == 3:
        pieces.append(Piece("lm_head.weight", MASTER, (4,), whole((4,)), torch.zeros(4)))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_pieces(CheckpointReader(path), pieces, shapes=SHAPES, group=dist.group.WORLD)


def test_an_error_of_one_loading_rank_is_an_error_of_all(saved: dict[str, Path]) -> None:
    run_ranks(RANKS, with_a_group, load_where_one_rank_asks_for_too_much, saved["rows"])


def agree_step_by_step(root: Path) -> None:
    world = dist.group.WORLD
    assert Search(root, world).next() is None
    first, second = (save(root, contents(pieces_at(split("rows", dist.get_rank())), step)) for step in (1, 2))
    found = Search(root, world).next()
    assert found is not None and found.path == second
    dist.barrier()
    if dist.get_rank() == 0:
        (second / "config.json").unlink()
    search = Search(root, world)
    found = search.next()
    assert found is not None and found.path == first
    assert [item.path for item in search.passed_over] == [second / "config.json"]
    if dist.get_rank() == 0:
        (first / "manifest.json").unlink()
    with pytest.raises(NoGoodCheckpoint) as caught:
        Search(root, world).next()
    assert len(caught.value.damaged) == 2


def test_ranks_agree_on_what_to_resume(tmp_path: Path) -> None:
    run_ranks(RANKS, with_a_group, agree_step_by_step, tmp_path)
    with pytest.raises(NoGoodCheckpoint):
        newest_checkpoint(tmp_path)
