"""Saves while training goes on: copies a rank's share, writes it from a thread of its own, reads it back, retains.

One save is in flight. A save that fails fails on all ranks alike and is reported, not raised: training goes on.
"""

import logging
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megalemur.checkpoint.contents import Contents
from megalemur.checkpoint.directory import step_directory, step_of
from megalemur.checkpoint.errors import CheckpointError
from megalemur.checkpoint.exchange import Attempt, Peers
from megalemur.checkpoint.hf_files import PieceReader
from megalemur.checkpoint.host_copy import HostCopy, copy_bytes
from megalemur.checkpoint.host_memory import Need, need_of, refuse_scarce
from megalemur.checkpoint.read_back import read_back
from megalemur.checkpoint.retention import Rules, describe, retain
from megalemur.checkpoint.save import Planner, SavePlan, Sizes, live_reader, write_checkpoint
from megalemur.config.checkpoint import CheckpointConfig

_log = logging.getLogger(__name__)


class Ended(NamedTuple):
    """How a save went."""

    step: int
    seconds: float
    """From its beginning until the checkpoint was committed, read back and the old ones were gone."""
    error: Exception | None
    """None: it stands."""


class Saver:
    """The saves of a run. Every rank has one; `prepare`, `save` and `wait` are called by all at the same step.

    The thread of a background save talks over `group`, which nobody else may use; it touches plain CPU tensors and
    neither the device nor megatron-core, whose redirects on CPU hold for the main thread alone.
    """

    def __init__(self, settings: CheckpointConfig, group: dist.ProcessGroup | None):
        """Nothing is allocated or touched yet.

        Args:
            settings: of the run.
            group: CPU process group (gloo) over all ranks, for this saver alone; None for a single process.
        """
        self._settings = settings
        self._peers = Peers(group)
        self._planner = Planner(self._peers, Sizes(settings.max_file_bytes, settings.weight_files))
        self._rules = Rules(settings.keep, settings.keep_every, settings.keep_weights_every)
        self._read_back: set[Path] = set()
        self._copy: HostCopy | None = None
        self._thread: threading.Thread | None = None
        self._ended: list[Ended] = []
        self._last_error: Exception | None = None
        self.failed_in_a_row = 0
        """Saves that failed since the last one that stands."""
        self.saved_step: int | None = None
        """Step of the newest checkpoint of this run's own state that stands."""

    def goes_on_from(self, path: Path | None) -> None:
        """The run stands where a checkpoint of its own was read in full; None: where there is none."""
        self.wait()
        self.saved_step = step_of(path) if path else None
        if path:
            self._read_back.add(path)

    @property
    def exhausted(self) -> bool:
        """Whether so many saves have failed in a row that the run should stop."""
        return self.failed_in_a_row >= self._settings.max_failed_saves

    def prepare(self, contents: Contents) -> None:
        """Make room for the copy before the first step. A collective; nothing for a saver that does not copy.

        Raises:
            CheckpointError: on every rank alike: a machine has too little memory, or the contents cannot be saved.
        """
        if self._settings.asynchronous and self._copy is None:
            self._make_room(self._planner.plan(contents), contents)

    def save(self, contents: Contents) -> Path:
        """Save; returns where the checkpoint will stand: at once, or when it has been copied. A collective.

        Waits for the save before it. What went wrong is found in `ended`.

        Raises:
            CheckpointError: on every rank alike: a machine has too little memory for the copy.
        """
        self.wait()
        started = time.monotonic()
        try:
            plan = self._planner.plan(contents)
        except CheckpointError as error:
            self._finish(contents.step, started, error)
            return step_directory(self._settings.directory, contents.step)
        if self._settings.asynchronous:
            self._make_room(plan, contents)
            assert self._copy is not None
            self._copy.take(contents.held)
            work = (plan, self._copy.read, started)
            self._thread = threading.Thread(target=self._work, args=work, name="megalemur-save")
            self._thread.start()
        else:
            self._work(plan, live_reader(contents), started)
        return step_directory(self._settings.directory, contents.step)

    def wait(self) -> None:
        """Until no save is in flight. Raises nothing."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    close = wait

    def ended(self) -> list[Ended]:
        """The saves that have ended since the last call, as this rank sees it: others may hear of one a step later."""
        found, self._ended = self._ended, []
        return found

    def raise_last(self) -> None:
        """Raise what the last save failed with, if it did. Call it after `wait`, and on all ranks.

        Raises:
            CheckpointError: on every rank alike.
        """
        if self._last_error is not None:
            raise self._last_error

    def _make_room(self, plan: SavePlan, contents: Contents) -> None:
        """Allocate the copy, at the first save and when this rank's share has changed. A collective."""
        own = plan.own(self._peers.rank)
        fits = self._copy is not None and self._copy.parts == own
        wanted = 0 if fits else copy_bytes(own)
        needs = [Need(*said) for said in self._peers.all_gather(need_of(wanted))]
        attempt = Attempt()
        with attempt.step():
            refuse_scarce(needs)
            if not fits:
                self._copy = None  # its memory goes first
                self._copy = HostCopy(own, pinned=any(piece.tensor.is_cuda for piece in contents.pieces))
        self._peers.raise_together(attempt.error, "making room for the copy of a background save")

    def _work(self, plan: SavePlan, read: PieceReader, started: float) -> None:
        error: Exception | None = None
        try:
            with torch.no_grad():
                self._write(plan, read)
        except Exception as caught:  # whatever it is, training goes on and hears of it
            error = caught
        self._finish(plan.step, started, error)

    def _write(self, plan: SavePlan, read: PieceReader) -> None:
        root = self._settings.directory
        self._read_back.discard(step_directory(root, plan.step))  # what comes now is another
        path, manifest = write_checkpoint(self._peers, root, plan, read)
        if not self._settings.read_back:
            return
        read_back(self._peers, path, manifest)
        self._read_back.add(path)
        if self._peers.rank == 0:
            self._retain(root)

    def _retain(self, root: Path) -> None:
        try:
            for line in describe(retain(root, self._rules, read_back=self._read_back)):
                _log.info(line)
        except OSError as error:  # the save stands all the same
            _log.warning("old checkpoints in %s could not be cleared away: %s", root, error)

    def _finish(self, step: int, started: float, error: Exception | None) -> None:
        seconds = time.monotonic() - started
        if error is None:
            _log.info("the checkpoint of step %d stands after %.2f s", step, seconds)
            self.saved_step, self.failed_in_a_row = step, 0
        else:
            self.failed_in_a_row += 1
            limit = self._settings.max_failed_saves
            _log.error("saving step %d failed (%d in a row, limit %d): %s", step, self.failed_in_a_row, limit, error)
        self._last_error = error
        self._ended.append(Ended(step, seconds, error))
