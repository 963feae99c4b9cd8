"""What can be wrong with checkpoints, as types that a caller can tell apart."""

from collections.abc import Sequence
from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint could not be written, read or fitted to the model. Raised on every rank alike."""


class DamagedCheckpoint(CheckpointError):
    """A file is missing, cut short, changed or makes no sense."""

    def __init__(self, path: Path, reason: str):
        self.path = path
        self.reason = reason
        super().__init__(f"{path}: {reason}")


class UnreadableCheckpoint(DamagedCheckpoint):
    """A file could not be read; another machine, or the same one later, may find it whole."""


class WeightsOnly(DamagedCheckpoint):
    """Good, but without the trainer's part: nothing to resume from."""


class NoGoodCheckpoint(CheckpointError):
    """There are checkpoints, and none of them verifies and holds all that a resume needs."""

    def __init__(self, root: Path, damaged: Sequence[DamagedCheckpoint]):
        self.damaged = tuple(damaged)
        listing = "\n".join(f"  - {item}" for item in damaged)
        super().__init__(
            f"{root}: none of its {len(damaged)} checkpoints can be resumed; restore one, or start with an empty "
            f"directory:\n"
            f"{listing}"
        )
