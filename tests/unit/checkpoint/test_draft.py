"""The folder of a save: who may remove it, and what a kill at each effect on the disk leaves behind."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from megalemur.checkpoint import draft as drafts
from megalemur.checkpoint.directory import newest_checkpoint, verify_checkpoint
from megalemur.checkpoint.draft import ABANDONED_SECONDS, open_draft, sweep
from tests.unit.checkpoint.small import EFFECTS, kill_before_effect, write_small


def test_a_live_save_is_never_swept_and_a_dead_one_is(tmp_path: Path) -> None:
    with_lock = open_draft(tmp_path, 7)
    assert sweep(tmp_path) == [] and with_lock.path.exists()
    with_lock.close()
    assert sweep(tmp_path) == [with_lock.path] and list(tmp_path.iterdir()) == []


def test_a_save_in_another_process_is_told_from_one_that_was_killed(tmp_path: Path) -> None:
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        open_draft(tmp_path, 7)
        os.write(told, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    assert sweep(tmp_path) == []
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(sweep(tmp_path)) == 1


@pytest.mark.parametrize("case", ["another machine", "killed before the lock"])
def test_without_a_lock_to_ask_only_what_has_been_idle_for_long_goes(case: str, tmp_path: Path) -> None:
    left = open_draft(tmp_path, 7)
    left.close()
    path = left.path
    if case == "another machine":
        path = left.path.rename(tmp_path / "step_000007.tmp-0000000012345678")
    else:
        (path / "manifest.json").unlink()
    assert sweep(tmp_path) == []
    past = time.time() - ABANDONED_SECONDS - 60
    for entry in [*path.rglob("*"), path]:
        os.utime(entry, (past, past))
    assert sweep(tmp_path) == [path]


def test_sweeping_touches_nothing_else(tmp_path: Path) -> None:
    write_small(tmp_path, 3)
    for name in ("step_000001.damaged-0a0a0a0a", "step_000003.replaced-0a0a0a0a", "notes.tmp-1", "step_7.tmp-1234567"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_000002.gone-0a0a0a0a" / "trainer").mkdir(parents=True)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert [path.name for path in sweep(tmp_path)] == ["step_000002.gone-0a0a0a0a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [name for name in before if ".gone-" not in name]


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that is there"])
def test_a_kill_before_each_effect_leaves_a_checkpoint_that_verifies(again: bool, tmp_path: Path) -> None:
    number, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        root = tmp_path / f"{number}"
        write_small(root, 4)
        if again:
            write_small(root, 5)
        code = kill_before_effect(number, lambda root=root: write_small(root, 5, text=b"new"))
        found = newest_checkpoint(root).path
        assert found is not None and verify_checkpoint(found).step == (5 if again or code == 0 else found_step(root))
        write_small(root, 5)
        # a folder without a manifest cannot be told from one that is just begun, and costs nothing
        assert all(not list(path.iterdir()) for path in root.glob("*.tmp-*"))
        assert not list(root.glob("*.gone-*"))
        shutil.rmtree(root)
    assert code == 0 and number > 15


def found_step(root: Path) -> int:
    """5 once the rename has happened, else 4."""
    return 5 if (root / "step_000005").exists() else 4


def test_every_function_that_changes_the_disk_is_counted() -> None:
    changing = {name for name, value in vars(drafts.disk).items() if callable(value) and not name.startswith("_")}
    assert changing - set(EFFECTS) == {"Any", "Path", "Sequence", "make_directories", "remove_tree", "start_writing"}
