"""What a run may start from, best first: its own checkpoints from the newest down, else what the run file names."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.distributed as dist

from megalemur.checkpoint.errors import CheckpointError, DamagedCheckpoint
from megalemur.checkpoint.exchange import Attempt, Peers
from megalemur.checkpoint.manifest import STATE
from megalemur.checkpoint.read import CheckpointReader, TensorReader
from megalemur.checkpoint.search import Search
from megalemur.config.run import RunConfig
from megalemur.data.errors import DataError
from megalemur.data.history import History
from megalemur.train.origin import Origin, find_origin
from megalemur.train.resume import Changes, changes_at_resume
from megalemur.train.state import RunState


class Start(NamedTuple):
    """A place to start from, and the position that goes with it."""

    origin: Origin
    state: RunState
    history: History | None
    """None: a new run."""
    changes: Changes
    """What going on from there changes about the run."""


class Starts:
    """Offers one start after the other. A collective over `group`; all ranks get the same."""

    def __init__(self, config: RunConfig, facts: Mapping[str, Any], group: dist.ProcessGroup | None = None):
        """Nothing is read yet.

        Args:
            config: the run.
            facts: of this process, as its checkpoints will record them.
            group: CPU process group over all ranks; None: this process looks for itself.
        """
        self._config, self._facts, self._peers = config, facts, Peers(group)
        self._search = Search(config.checkpoint.directory, group)
        self._own: CheckpointReader | None = None

    def next(self) -> Start:
        """The best that was not offered yet. Nothing but headers and small files was read of it.

        Raises:
            NoGoodCheckpoint: the run has checkpoints, and none is left.
            ValueError, CheckpointError: what is there does not fit the run file, on every rank alike.
        """
        while True:
            self._own = self._search.next()
            try:
                return self._start()
            except DamagedCheckpoint as error:
                self.pass_over(error)

    def pass_over(self, error: DamagedCheckpoint) -> None:
        """Damage was found in the start that was offered last; `next` gives an older one.

        Raises:
            DamagedCheckpoint: it was not one of this run's own checkpoints, and there is no older one.
        """
        if self._own is None:
            raise error
        self._search.pass_over(self._own, error)

    def _start(self) -> Start:
        attempt, found = Attempt(), None
        with attempt.step():
            # first: it lists everything that does not fit at once, the model's settings among them
            changes = self._changes(self._own)
            origin = find_origin(self._config, self._own, self._peers)
            if self._own is None and origin.resumed:
                changes = self._changes(origin.reader)
            found = Start(origin, *position(origin), changes)
        try:
            self._peers.raise_together(attempt.error, "looking for what to start from")
        except CheckpointError:
            if attempt.error is not None and not isinstance(attempt.error, CheckpointError):
                raise attempt.error from None  # its type has an exit code of its own
            raise
        assert found is not None
        return found

    def _changes(self, reader: TensorReader | None) -> Changes:
        if not isinstance(reader, CheckpointReader):
            return Changes()
        return changes_at_resume(self._config, reader, self._facts)


def position(origin: Origin) -> tuple[RunState, History | None]:
    """Counters and data history of the run that is gone on with; zero and none at a start.

    Raises:
        DamagedCheckpoint: trainer/state.json is not what this program writes.
    """
    saved = origin.state
    if saved is None:
        return RunState(), None
    assert origin.reader is not None
    try:
        return RunState.from_json(saved["run"]), History.from_json(saved["data"], origin=STATE)
    except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
        raise DamagedCheckpoint(origin.reader.path / STATE, f"cannot be used: {error}") from error
