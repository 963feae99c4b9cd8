"""Saves while training goes on: the state of the step bit by bit, and failures on all ranks alike."""

import errno
import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalemur.checkpoint import disk
from megalemur.checkpoint.directory import newest_checkpoint, verify_checkpoint
from megalemur.checkpoint.errors import CheckpointError
from megalemur.checkpoint.retention import Rules, retain
from megalemur.checkpoint.save import Contents, save_checkpoint
from megalemur.checkpoint.saver import Saver
from megalemur.config.checkpoint import CheckpointConfig
from megalemur.config.state_bytes import share_bytes
from megalemur.parallel.state import KINDS, Box, Piece
from tests.distributed.test_checkpoint_files import LAYOUTS, RANKS, split, with_a_group
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run
from tests.support.training import train_and_save
from tests.unit.checkpoint.synthetic import contents, pieces_at


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def save_and_change_at_once(root: Path) -> None:
    group = dist.new_group(backend="gloo")
    for step, layout in enumerate(LAYOUTS):
        pieces = pieces_at(split(layout, dist.get_rank()))
        saver = Saver(CheckpointConfig(directory=root / "background", max_file_bytes=200), group)
        saver.prepare(contents(pieces, step))
        save_checkpoint(root / "plain", contents(pieces, step), group=dist.group.WORLD, max_file_bytes=200)
        saver.save(contents(pieces, step))
        for piece in pieces:
            piece.tensor.fill_(torch.nan)
        dist.barrier()  # the steps' own group, while the save talks over another
        saver.wait()
        saver.raise_last()
        assert saver.saved_step == step and [ended.error for ended in saver.ended()] == [None]


def test_a_background_save_is_bit_equal_to_a_plain_one_although_training_goes_on(tmp_path: Path) -> None:
    run_ranks(RANKS, with_a_group, save_and_change_at_once, tmp_path)
    for step in range(len(LAYOUTS)):
        one, other = (tmp_path / kind / f"step_{step:06d}" for kind in ("plain", "background"))
        assert files_of(one) == files_of(other) and verify_checkpoint(other).step == step


def fail_on_one_rank(root: Path) -> None:
    rank = dist.get_rank()
    saver = Saver(CheckpointConfig(directory=root, max_failed_saves=2, keep=1), dist.new_group(backend="gloo"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    seen = []
    for step, works in enumerate([True, False, True, False, False]):
        good = contents(pieces_at(split("rows", rank)), step)
        if rank == 1 and not works:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        saver.save(good)
        saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        (ended,) = saver.ended()
        assert ended.step == step and (ended.error is None) == works
        if not works:
            assert "rank 1: OSError" in str(ended.error), ended.error
            with pytest.raises(CheckpointError):
                saver.raise_last()
        seen.append((saver.failed_in_a_row, saver.exhausted, saver.saved_step))
    assert seen == [(0, False, 0), (1, False, 0), (0, False, 2), (1, False, 2), (2, True, 2)]
    assert newest_checkpoint(root).path == root / "step_000002"


def test_a_failed_save_fails_on_all_ranks_alike_and_the_next_one_works(tmp_path: Path) -> None:
    run_ranks(RANKS, with_a_group, fail_on_one_rank, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


def fail_to_close_on_one_rank(root: Path) -> None:
    """As a network file system may, whose servers say only at the close that they could not write."""
    rank, close = dist.get_rank(), disk.close
    for background in (True, False):
        settings = CheckpointConfig(directory=root / str(background), asynchronous=background)
        saver = Saver(settings, dist.new_group(backend="gloo"))
        for step, works in enumerate([False, True]):
            disk.close = refuse_to_close if rank == 1 and not works else close
            saver.save(contents(pieces_at(split("rows", rank)), step))
            saver.wait()
            (ended,) = saver.ended()
            assert (ended.error is None) == works
            assert works or "rank 1: OSError" in str(ended.error), ended.error
        assert saver.saved_step == 1


def refuse_to_close(file: int) -> None:
    os.close(file)
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_that_cannot_be_closed_is_a_failed_save_on_all_ranks_and_nobody_waits(tmp_path: Path) -> None:
    run_ranks(RANKS, with_a_group, fail_to_close_on_one_rank, tmp_path)


def damage_before_the_read_back(root: Path) -> None:
    from megalemur.checkpoint import disk

    saver = Saver(CheckpointConfig(directory=root, keep=1), dist.new_group(backend="gloo"))
    sync_directory = disk.sync_directory

    def sync_and_damage(path: Path) -> None:
        sync_directory(path)
        victim = root / "step_000002" / "trainer" / "rank-00002.safetensors"
        if path == root and victim.exists():
            data = bytearray(victim.read_bytes())
            data[-1] ^= 1
            victim.write_bytes(data)

    disk.sync_directory = sync_and_damage
    for step in (1, 2):
        saver.save(contents(pieces_at(split("rows", dist.get_rank())), step))
        saver.wait()
    assert saver.saved_step == 1 and saver.failed_in_a_row == 1
    with pytest.raises(CheckpointError, match=r"rank-00002\.safetensors.*differ from those that were written.*aside"):
        saver.raise_last()


def test_a_disk_that_gives_other_bytes_back_is_a_failed_save_and_deletes_nothing(tmp_path: Path) -> None:
    run_ranks(RANKS, with_a_group, damage_before_the_read_back, tmp_path)
    names = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert names == ["step_000001", "step_000002.damaged"]
    verify_checkpoint(tmp_path / "step_000001")


LARGE = {"large": (17, 1 << 20), "small": (8,), "other": (17, 1 << 20)}
"""Two tensors of 68 MiB in fp32: no multiple of what is written at once."""


def peak_bytes_of_a_save(root: Path) -> int:
    """Memory above what was held before a plain save, at its peak, on this rank."""
    rank = dist.get_rank()
    first, last = (0, 9) if rank == 0 else (9, 17)
    pieces = [
        Piece(name, kind, (17, 1 << 20), Box((first, 0), (last, 1 << 20)), torch.ones(last - first, 1 << 20))
        for name in ("large", "other")
        for kind in KINDS
    ]
    pieces += [Piece("small", kind, (8,), Box((0,), (8,)), torch.ones(8)) for kind in KINDS]
    what = Contents(1, pieces, LARGE, dict.fromkeys(LARGE, torch.float32), {}, {}, {})
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    save_checkpoint(root, what, group=dist.group.WORLD, max_file_bytes=1 << 40)
    return status("VmHWM") - before


def status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def peaks(root: Path) -> int:
    dist.init_process_group("gloo")
    return peak_bytes_of_a_save(root)


def test_a_save_takes_one_tensor_and_a_fixed_buffer(tmp_path: Path) -> None:
    tensor, buffer = 68 << 20, 24 << 20
    found = run_ranks(2, peaks, tmp_path)
    assert max(found) > tensor // 2, "the writer holds the gathered tensor: the measure works"
    assert max(found) < tensor + buffer, found


@pytest.mark.parametrize("optimizer", ["true", "false"], ids=["distributed optimizer", "copies on every replica"])
def test_a_rank_writes_the_share_that_the_configuration_says(optimizer: str, tmp_path: Path) -> None:
    layout = ("parallel.pipeline=2", "parallel.data=2", f"parallel.distributed_optimizer={optimizer}")
    config = tiny_run(tmp_path, *layout, "run.stop_at=1")
    path = run_ranks(4, train_and_save, config)[0][1]
    sizes = [file.stat().st_size for file in path.glob("trainer/rank-*.safetensors")]
    share = share_bytes(config.model, config.parallel)
    assert len(sizes) == 4 and 0.98 * share < max(sizes) < 1.1 * share, "with its header"


def train_through_failures(config):
    from megalemur.train.agreement import StopRequest
    from megalemur.train.loop import run_loop
    from tests.support.training import Watching, start

    run = start(config)
    root = config.checkpoint.directory
    watching = Watching()
    if run.place.rank == 0:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.write_text("a file where the directory should be")
    dist.barrier()
    try:
        with StopRequest() as stop:
            run_loop(run, [watching], stop)
    except CheckpointError as error:
        return run.state.step, str(error), sum(report.failed_saves for report in watching.reports)
    return None


def test_saves_that_go_on_failing_stop_all_ranks_at_one_step(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "parallel.data=2", "checkpoint.save_every=1", "checkpoint.max_failed_saves=2")
    (step, said, failed), (other, also, _) = run_ranks(2, train_through_failures, config)
    assert step == other and 2 <= step < 10, "training went on after the first failure"
    assert said == also and "max_failed_saves" in said
    assert failed >= 1


def train_all(config):
    from megalemur.train.agreement import StopRequest
    from megalemur.train.loop import run_loop
    from tests.support.training import Watching, start

    run = start(config)
    watching = Watching()
    with StopRequest() as stop:
        run_loop(run, [watching], stop)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("megalemur")]
    return left, sum(report.save_write_seconds for report in watching.reports)


def test_background_and_plain_saves_of_a_run_hold_the_same_bits(tmp_path: Path) -> None:
    kept = {}
    for background in ("true", "false"):
        directory = tmp_path / background
        config = tiny_run(
            tmp_path,
            "parallel.tensor=2",
            "run.stop_at=5",
            "checkpoint.save_every=2",
            f"checkpoint.asynchronous={background}",
            f"checkpoint.directory={directory}",
        )
        for left, seconds in run_ranks(2, train_all, config):
            assert left == [] and seconds > 0
        kept[background] = {path.name: files_of(path) for path in directory.iterdir()}
        assert sorted(kept[background]) == ["step_000002", "step_000004", "step_000005"]
    for step, files in kept["true"].items():
        for name in files:
            if not name.endswith(("run.yaml", "manifest.json")):  # the two settings differ, and their digest
                assert files[name] == kept["false"][step][name], name


def start_and_save(config, to: Path) -> Path:
    from megalemur.train.saving import contents_of
    from tests.support.training import start

    run = start(config)
    assert run.state.step == 0 and not run.origin.resumed
    return save_checkpoint(to, contents_of(run), group=None, max_file_bytes=config.checkpoint.max_file_bytes)


def test_a_new_run_starts_from_weights_that_were_kept_alone(tmp_path: Path) -> None:
    ((_, path),) = run_ranks(1, train_and_save, tiny_run(tmp_path, "run.stop_at=2"))
    newer = shutil.copytree(path, path.with_name("step_000004"))
    retained = retain(path.parent, Rules(keep=1, keep_weights_every=2), read_back={newer})
    assert retained.thinned == [path] and not (path / "trainer").exists()
    config = tiny_run(tmp_path, f"checkpoint.directory={tmp_path}/new", start_from=path)
    (again,) = run_ranks(1, start_and_save, config, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
