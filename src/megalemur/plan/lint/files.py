"""The files that a run names, opened once for all rules: sources with their manifests, and the newest checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megalemur.checkpoint.directory import Newest, newest_checkpoint
from megalemur.checkpoint.errors import CheckpointError
from megalemur.config.run import RunConfig
from megalemur.data.errors import DataError
from megalemur.data.history import History
from megalemur.data.order import Order
from megalemur.data.sources import OpenSource, open_source, shares_of


@dataclass(frozen=True)
class Files:
    """What a run reads; nothing is opened before it is asked for."""

    config: RunConfig

    @cached_property
    def _opened(self) -> tuple[list[OpenSource], list[OpenSource], list[str]]:
        data, problems = self.config.data, list[str]()
        training, validation = list[OpenSource](), list[OpenSource]()
        for found, sources, seed in (
            (training, data.sources, self.config.run.seed),
            (validation, data.validation, None),
        ):
            for source in sources:
                try:
                    vocabulary = self.config.model.vocab_size
                    found.append(open_source(source, data.sequence_length, seed=seed, vocab_size=vocabulary))
                except (DataError, ValueError) as error:
                    problems.append(f"data source {source.name}: {error}")
        return training, validation, problems

    @property
    def training(self) -> list[OpenSource]:
        """Training sources that could be opened."""
        return self._opened[0]

    @property
    def validation(self) -> list[OpenSource]:
        """Validation sources that could be opened."""
        return self._opened[1]

    @property
    def refused(self) -> list[str]:
        """A sentence for each source that could not."""
        return self._opened[2]

    def samples_drawn(self) -> Mapping[str, int]:
        """Samples that a new run draws from each source, by name; empty where the sources cannot be used together."""
        if self.refused or not self.training:
            return {}
        try:
            shares = shares_of(self.training)
        except ValueError:
            return {}
        history = History.begin(self.config.run.seed, self.config.data.sequence_length, shares)
        counts = Order(history).counts(self.config.run.steps * self.config.data.global_batch_size)
        return {source.config.name: counts[source.key] for source in self.training}

    @cached_property
    def newest(self) -> Newest | CheckpointError:
        """The run's newest whole checkpoint, or why none can be used."""
        try:
            return newest_checkpoint(self.config.checkpoint.directory)
        except CheckpointError as error:
            return error
