"""What stays: by the rules, after kills at any point, and never below one checkpoint that was read back."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalemur.checkpoint.directory import (
    checkpoint_directories,
    newest_checkpoint,
    open_manifest,
    open_whole,
    step_of,
    verify_checkpoint,
)
from megalemur.checkpoint.errors import CheckpointError, DamagedCheckpoint, NoGoodCheckpoint
from megalemur.checkpoint.exchange import Peers
from megalemur.checkpoint.read_back import read_back
from megalemur.checkpoint.retention import Rules, retain, survey
from tests.unit.checkpoint.small import kill_before_effect, write_small


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def steps(root: Path) -> list[int]:
    return sorted(step_of(path) or 0 for path in checkpoint_directories(root))


def save_steps(root: Path, *numbers: int) -> list[Path]:
    return [write_small(root, number) for number in numbers]


def test_the_newest_stay_and_every_mth_and_the_weights_of_others(tmp_path: Path) -> None:
    paths = save_steps(tmp_path, *range(10, 130, 10))
    retained = retain(tmp_path, Rules(keep=2, keep_every=60, keep_weights_every=20), read_back={paths[-1]})
    assert steps(tmp_path) == [20, 40, 60, 80, 100, 110, 120]
    assert [step_of(path) for path in retained.gone] == [10, 30, 50, 70, 90]
    assert [step_of(path) for path in retained.thinned] == [20, 40, 80, 100]
    for step in steps(tmp_path):
        manifest = verify_checkpoint(tmp_path / f"step_{step:06d}")
        assert bool(manifest.dropped) == (step in (20, 40, 80, 100))
        assert (tmp_path / f"step_{step:06d}" / "trainer").exists() != bool(manifest.dropped)


def test_without_a_limit_everything_stays(tmp_path: Path) -> None:
    paths = save_steps(tmp_path, 1, 2, 3)
    assert retain(tmp_path, Rules(), read_back=set(paths)) == ([], [])


def test_nothing_goes_before_a_newer_one_was_read_back(tmp_path: Path) -> None:
    paths = save_steps(tmp_path, 1, 2, 3, 4)
    assert retain(tmp_path, Rules(keep=1), read_back=()) == ([], [])
    assert retain(tmp_path, Rules(keep=1), read_back={paths[1]}) == ([], []), "itself to go"
    assert retain(tmp_path, Rules(keep=3), read_back={paths[1]}).gone == [paths[0]]
    assert retain(tmp_path, Rules(keep=1), read_back={paths[3]}).gone == paths[1:3]


def test_damaged_ones_count_for_nothing(tmp_path: Path) -> None:
    paths = save_steps(tmp_path, 1, 2, 3, 4)
    (paths[3] / "config.json").unlink()
    assert retain(tmp_path, Rules(keep=2), read_back={paths[2]}).gone == [paths[0]]
    assert steps(tmp_path) == [2, 3, 4]


def test_one_that_made_room_goes_once_its_successor_was_read_back(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    path = write_small(tmp_path, 2, text=b"again")
    assert len(names(tmp_path)) == 3
    assert len(retain(tmp_path, Rules(), read_back={path}).gone) == 1
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_what_differs_on_the_disk_is_named_and_set_aside(tmp_path: Path) -> None:
    _, path = save_steps(tmp_path, 1, 2)
    manifest = open_manifest(path)
    (path / "config.json").write_bytes(b"texT")
    with pytest.raises(CheckpointError, match=r"config\.json.*differ.*set aside"):
        read_back(Peers(None), path, manifest)
    assert steps(tmp_path) == [1] and names(tmp_path)[1].startswith("step_000002.damaged-")


def test_a_kill_before_each_effect_of_a_pass_loses_nothing_that_stays(tmp_path: Path) -> None:
    rules, number, code = Rules(keep=1, keep_weights_every=2), 0, 1
    while code != 0:
        number += 1
        root = tmp_path / f"{number}"
        *_, newest = save_steps(root, 1, 2, 3, 4, 5)
        code = kill_before_effect(number, lambda root=root, newest=newest: retain(root, rules, read_back={newest}))
        assert newest_checkpoint(root).path == newest
        for path in checkpoint_directories(root):
            verify_checkpoint(path)
        retain(root, rules, read_back={newest})
        assert steps(root) == [2, 4, 5]
        assert list(root.glob("step_00000?/trainer")) == [newest / "trainer"]
        write_small(root, 6)
        assert steps(root) == [2, 4, 5, 6] and len(names(root)) == 4, "what was half deleted is gone"
    assert number > 20


class World:
    """A run that saves, is killed and started again, on a disk that rots; asks after each event what is left."""

    def __init__(self, root: Path, rules: Rules):
        self.root, self.rules = root, rules
        self.step = 0
        self.known: set[Path] = set()
        """Read back in this life of the run, or verified when it resumed."""

    def verified(self) -> set[Path]:
        """Checkpoints that a run could resume from, by every byte."""
        found = set()
        for path in checkpoint_directories(self.root):
            try:
                open_whole(path)
                verify_checkpoint(path)
            except DamagedCheckpoint:
                continue
            found.add(path)
        return found

    def save(self, killed_at: int) -> None:
        """Save, read back, retain; killed before some effect on the disk where it has so many."""
        self.step += 1
        code = kill_before_effect(killed_at, self._save) if killed_at else self._save_here()
        if code:
            self.restart()
        elif killed_at:
            self.known.add(self.root / f"step_{self.step:06d}")

    def _save_here(self) -> int:
        self._save()
        return 0

    def _save(self) -> None:
        path = write_small(self.root, self.step, text=b"%d" % self.step)
        read_back(Peers(None), path, open_manifest(path))
        self.known.add(path)
        before = self.verified()
        retain(self.root, self.rules, read_back=self.known)
        assert path in self.verified() and self.verified() <= before

    def damage(self, number: int, how: str) -> None:
        """Harm one checkpoint, if another that verifies is left: no retention could mend the last."""
        paths = checkpoint_directories(self.root)
        if not paths:
            return
        path = paths[number % len(paths)]
        if not self.verified() - {path}:
            return
        file = path / "config.json"
        if not file.exists() or not (data := file.read_bytes()):
            return
        if how == "flip":
            file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        elif how == "cut":
            file.write_bytes(b"")
        else:
            file.unlink()

    def restart(self) -> None:
        """A new process: knows what it has read in full, and goes on from the newest that verifies."""
        found = self.verified()
        newest = max(found, key=lambda path: step_of(path) or 0, default=None)
        self.known = {newest} if newest else set()
        self.step = (step_of(newest) or 0) if newest else 0


RULES = st.builds(
    Rules, keep=st.integers(1, 3), keep_every=st.sampled_from([0, 4]), keep_weights_every=st.sampled_from([0, 2, 3])
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.sampled_from([0, 0, *range(1, 60)])),
        st.tuples(st.just("damage"), st.integers(0, 5), st.sampled_from(["flip", "cut", "gone"])),
        st.tuples(st.just("restart")),
    ),
    min_size=3,
    max_size=12,
)


def check_schedule(rules: Rules, events: list[tuple]) -> None:
    """One trial: as soon as one checkpoint verified, one always does; what stays for good is there."""
    memory = Path("/dev/shm")  # where it can be had: a trial brings some hundred files to the disk
    root = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    try:
        world, had_one = World(root, rules), False
        for event, *details in events:
            getattr(world, event)(*details)
            verified = world.verified()
            assert verified or not had_one, (event, details, names(root))
            had_one = bool(verified)
            try:
                newest_checkpoint(root)
            except NoGoodCheckpoint:
                assert not had_one
    finally:
        shutil.rmtree(root)


@settings(max_examples=40, deadline=None)
@given(RULES, EVENTS)
def test_there_is_always_one_that_verifies(rules: Rules, events: list[tuple]) -> None:
    check_schedule(rules, events)


def test_what_is_due_is_kept_over_many_saves(tmp_path: Path) -> None:
    world = World(tmp_path, Rules(keep=2, keep_every=5, keep_weights_every=3))
    for _ in range(17):
        world.save(0)
    assert steps(tmp_path) == [3, 5, 6, 9, 10, 12, 15, 16, 17]
    assert [item.step for item in reversed(survey(tmp_path)) if not item.is_whole] == [3, 6, 9, 12]
