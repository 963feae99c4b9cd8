"""The batches of the coming steps, read by a thread while a step computes; begins anew after a rollback."""

from collections.abc import Generator

from megalemur.data.batches import Batch
from megalemur.train.setup import Run


class ReadAhead:
    """Batches of a run from its present sample on. Close it to end the thread."""

    def __init__(self, run: Run):
        self._run = run
        self._feed = self._begin()

    def _begin(self) -> Generator[list[Batch], None, None]:
        return self._run.data.training.prefetched(self._run.state.samples, self._run.portion)

    def next(self) -> list[Batch]:
        """This replica's micro-batches of the next step."""
        return next(self._feed)

    def restart(self) -> None:
        """Go on with the data, the history and the sample that the run has now."""
        self._feed.close()
        self._feed = self._begin()

    def close(self) -> None:
        """End the thread."""
        self._feed.close()
