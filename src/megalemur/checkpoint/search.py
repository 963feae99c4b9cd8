"""A run's checkpoints, newest first, as rank 0 sees them. Passes over what is damaged, and says so once.

Believes no link: what is named step_N lies where it was written, or is not looked at.
"""

import logging
import secrets
from pathlib import Path

import torch.distributed as dist

from megalemur.checkpoint.directory import checkpoint_directories, open_manifest
from megalemur.checkpoint.errors import DamagedCheckpoint, NoGoodCheckpoint, UnreadableCheckpoint, WeightsOnly
from megalemur.checkpoint.exchange import Attempt, Peers
from megalemur.checkpoint.manifest import MANIFEST, TRAINER
from megalemur.checkpoint.opening import open_together
from megalemur.checkpoint.read import CheckpointReader

_log = logging.getLogger(__name__)


class Search:
    """Offers each checkpoint once. Every method is a collective; all ranks get the same answers.

    Without a group nothing is logged and nothing moved: that is the look before a run begins, which every process
    takes.
    """

    def __init__(self, root: Path, group: dist.ProcessGroup | None = None):
        """List them.

        Args:
            root: folder of the run's checkpoints.
            group: CPU process group; None: this process alone.

        Raises:
            CheckpointError: rank 0 cannot look.
        """
        self._root, self._peers = root, Peers(group)
        attempt, names = Attempt(), list[str]()
        if self._peers.rank == 0:
            with attempt.step():
                names = [path.name for path in checkpoint_directories(root)]
        self._peers.raise_together(attempt.error, f"looking for checkpoints in {root}")
        self._left = [root / name for name in self._peers.all_gather(names)[0]]
        self.passed_over: list[DamagedCheckpoint] = []
        """What could not be used, newest first."""

    def next(self) -> CheckpointReader | None:
        """The newest that was not offered yet and verifies, but for the tensors; None where nobody ever saved.

        Raises:
            NoGoodCheckpoint: there are checkpoints, and none is left.
        """
        while self._left:
            path = self._left.pop(0)
            try:
                return self._open(path)
            except DamagedCheckpoint as error:
                self._pass_over(path, error)
        if self.passed_over:
            raise NoGoodCheckpoint(self._root, self.passed_over)
        return None

    def pass_over(self, reader: CheckpointReader, error: DamagedCheckpoint) -> None:
        """Damage was found in one that `next` gave."""
        self._pass_over(reader.path, error)

    def _pass_over(self, path: Path, error: DamagedCheckpoint) -> None:
        self.passed_over.append(error)
        if self._peers.group is None:
            return
        _log.warning("passed over a checkpoint: %s", error)
        if self._peers.rank == 0 and not isinstance(error, UnreadableCheckpoint | WeightsOnly):
            _move_aside(path)

    def _open(self, path: Path) -> CheckpointReader:
        attempt = Attempt()
        if self._peers.rank == 0:
            with attempt.step():
                if path.is_symlink():
                    raise DamagedCheckpoint(path, "is a link; a checkpoint is a directory")
        self._peers.raise_together(attempt.error, f"opening {path}")
        opened = open_together(path, self._peers)
        if path.name.split(".")[0] != f"step_{opened.manifest.step:06d}":
            raise DamagedCheckpoint(path / MANIFEST, f"is of step {opened.manifest.step}: the directory was renamed")
        if opened.manifest.dropped:
            raise WeightsOnly(
                path / TRAINER, "was dropped; the weights alone can be checkpoint.start_from of a new run"
            )
        return CheckpointReader(path, opened=opened)


def _move_aside(path: Path) -> None:
    """Where manifest and sizes verify, it would count as good for whoever keeps or saves checkpoints."""
    aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
    try:
        open_manifest(path)
        path.rename(aside)
    except DamagedCheckpoint:
        return
    except OSError as error:
        _log.warning("%s stays where it is: %s", path, error.strerror)
    else:
        _log.warning("moved it to %s", aside)
