"""What a run reads: the training blend and the validation sources, as micro-batches of one replica.

Refuses a history of another seed or sequence length, and more epochs than the run file allows.
"""

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from megalemur.config.data import DataConfig
from megalemur.data.batches import Batch, DocumentMask, Portion, make_batch
from megalemur.data.errors import DataError
from megalemur.data.history import History
from megalemur.data.order import Order
from megalemur.data.sources import OpenSource, check_tokenizers, open_source, shares_of

_log = logging.getLogger(__name__)


class TrainingData:
    """The blend that a run trains on."""

    def __init__(self, history: History, sources: Iterable[OpenSource], document_mask: DocumentMask):
        """Tie the order to its sources.

        Args:
            history: what the order is a function of; its last blend names these sources.
            sources: open sources.
            document_mask: as in DataConfig.
        """
        self.history = history
        self.sources = {source.key: source for source in sources}
        self._order, self._document_mask = Order(history), document_mask

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The micro-batch of these samples, counted as the run draws them."""
        samples = []
        for number in numbers:
            draw = self._order(number)
            if draw.key not in self.sources:
                raise DataError(
                    f"sample {number} comes from a source of an earlier blend (digest {draw.key}), which "
                    "data.sources no longer names"
                )
            samples.append(self.sources[draw.key].sample(draw.ordinal))
        return make_batch(samples, self._document_mask)

    def micro_batches(self, first_sample: int, portion: Portion) -> list[Batch]:
        """One replica's micro-batches of the step that begins after `first_sample` samples."""
        return [self.batch(numbers) for numbers in portion.sample_numbers(first_sample)]

    def prefetched(self, first_sample: int, portion: Portion) -> Generator[list[Batch], None, None]:
        """`micro_batches` of this step and all later ones; a thread reads the next step while one is used.

        The thread touches numpy and CPU tensors only. Close the iterator to end it.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="megalemur-data") as thread:
            ahead = thread.submit(self.micro_batches, first_sample, portion)
            while True:
                first_sample += portion.global_batch_size
                now, ahead = ahead, thread.submit(self.micro_batches, first_sample, portion)
                yield now.result()

    def ledger(self, samples: int) -> dict[str, int]:
        """Samples behind each source after the run has drawn `samples`, by name; former sources as name@digest."""
        shares = [share for blend in self.history.blends for share in blend.shares]
        names = {share.key: f"{share.name}@{share.key[:8]}" for share in shares}
        names |= {key: source.config.name for key, source in self.sources.items()}
        return {names[key]: count for key, count in self._order.counts(samples).items()}

    def check_epochs(self, total_samples: int) -> None:
        """Refuse a run of `total_samples` samples that would use a source more often than its max_epochs.

        Raises:
            ValueError: naming the settings.
        """
        counts = self._order.counts(total_samples)
        for key, source in self.sources.items():
            limit, size = source.config.max_epochs, source.samples.samples_per_epoch
            if limit is not None and counts[key] > limit * size:
                raise ValueError(
                    f"data.sources: {source.config.name}: the run's {total_samples} samples take {counts[key]} of it, "
                    f"{counts[key] / size:.2f} epochs of {size}, more than its max_epochs={limit:g}; lower run.steps "
                    "or its weight, or raise its max_epochs"
                )


class ValidationData:
    """One validation source: always the same first samples of the file, in its order, whatever the seed."""

    def __init__(self, source: OpenSource, data: DataConfig):
        """Choose the samples: data.validation_samples of them, or all where the source has fewer."""
        self.name = source.config.name
        self.samples = min(data.validation_samples, source.samples.samples_per_epoch)
        self._source, self._document_mask = source, data.document_mask

    def rounds(self, portion: Portion) -> Iterator[list[Batch]]:
        """One replica's micro-batches, one list a global batch; a last one is filled up with samples that do not count.

        So the loss is the same for every batch size and layout.
        """
        for first in range(0, self.samples, portion.global_batch_size):
            yield [self._batch(numbers) for numbers in portion.sample_numbers(first)]

    def _batch(self, numbers: Sequence[int]) -> Batch:
        samples = [self._source.sample(number % self.samples) for number in numbers]
        return make_batch(samples, self._document_mask, [number < self.samples for number in numbers])


class Data(NamedTuple):
    """Everything a run reads."""

    training: TrainingData
    validation: tuple[ValidationData, ...]


def build_data(
    config: DataConfig,
    *,
    seed: int,
    vocab_size: int,
    total_samples: int,
    history: History | None = None,
    drawn: int = 0,
) -> Data:
    """Open and check all sources. Rank-independent: what is refused is refused on every rank.

    A blend that differs from the history's goes into it, beginning at `drawn`, and is logged.

    Args:
        config: the data settings.
        seed: of the order.
        vocab_size: the model's, without padding.
        total_samples: samples that the run draws in all, from its very beginning.
        history: of the run that is resumed; None: a new run.
        drawn: samples that it has drawn.

    Raises:
        ValueError: settings that do not fit each other or the history.
        DataError: files that cannot be used.
    """
    length = config.sequence_length
    opened = [open_source(source, length, seed=seed, vocab_size=vocab_size) for source in config.sources]
    validation = [open_source(source, length, seed=None, vocab_size=vocab_size) for source in config.validation]
    check_tokenizers([*opened, *validation], config.tokenizer)
    shares = shares_of(opened)
    if history is None:
        history = History.begin(seed, length, shares)
    _check_resumed(history, seed, length)
    resumed = history.with_blend(drawn, shares)
    if resumed != history:
        _log.warning("the blend of data.sources changes at sample %d: %s", drawn, {s.name: s.weight for s in shares})
    training = TrainingData(resumed, opened, config.document_mask)
    training.check_epochs(total_samples)
    return Data(training, tuple(ValidationData(source, config) for source in validation))


def _check_resumed(history: History, seed: int, sequence_length: int) -> None:
    """Another seed or length would deal samples that were seen, and leave out others, without a word."""
    for setting, now, then in (
        ("run.seed", seed, history.seed),
        ("data.sequence_length", sequence_length, history.sequence_length),
    ):
        if now != then:
            raise ValueError(
                f"{setting}={now}, but the run that is resumed has {then}: samples would come twice or never; "
                f"use {then}, or start a new run from its weights (checkpoint.start_from, checkpoint.load=weights)"
            )
