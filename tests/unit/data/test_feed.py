"""What a run reads: the blend over its sources, its resumes, its validation, and what is refused before a step."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from megalemur.config.data import DataConfig
from megalemur.data.batches import Portion
from megalemur.data.errors import DataError, MissingDataError, VocabularyError
from megalemur.data.feed import build_data
from megalemur.data.history import History
from megalemur.data.writer import IndexedWriter
from tests.support.datasets import manifest_of, tokenizer_record

S, BATCH = 8, 12


def source(directory: Path, name: str, first: int, tokens: int, *, tokenizer: bytes | None = None) -> Path:
    """Documents of 10 tokens whose ids count up from `first`."""
    with IndexedWriter(directory / name, vocab_size=1000) as writer:
        for start in range(first, first + tokens, 10):
            writer.add(range(start, min(start + 10, first + tokens)))
        record = tokenizer_record(tokenizer or b"", vocab_size=1000)
        writer.commit(None if tokenizer is None else lambda written: manifest_of(written, record))
    return directory / name


@pytest.fixture
def settings(tmp_path):
    def make(**changes) -> DataConfig:
        sources = [
            {"name": "code", "path": source(tmp_path, "code", 0, 405), "weight": 3.0},
            {"name": "text", "path": source(tmp_path, "text", 500, 170), "weight": 1.0},
        ]
        values = {"sequence_length": S, "global_batch_size": BATCH, "sources": sources, **changes}
        return DataConfig(**values)

    return make


def open_data(config: DataConfig, **changes):
    return build_data(config, **{"seed": 7, "vocab_size": 1000, "total_samples": 100, **changes})


def rows(batches) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.tokens.tolist()]


@pytest.mark.parametrize("dp_size, micro", [(2, 3), (4, 1), (1, 12), (12, 1)])
def test_every_layout_trains_on_the_same_samples(settings, dp_size, micro):
    data = open_data(settings(document_mask="intra")).training
    for step in range(4):
        whole = rows(data.micro_batches(step * BATCH, Portion(0, 1, 1, BATCH)))
        parts = [rows(data.micro_batches(step * BATCH, Portion(d, dp_size, micro, BATCH))) for d in range(dp_size)]
        assert Counter(whole) == Counter(row for part in parts for row in part)


def test_an_epoch_of_a_source_uses_each_label_once(settings):
    data = open_data(settings()).training
    # 50 windows of code an epoch: the first 50 samples of it
    labels: Counter[int] = Counter()
    code, n = 0, 0
    while code < 50:
        batch = data.batch([n])
        n += 1
        if int(batch.tokens[0, 0]) < 500:
            code += 1
            labels.update(batch.labels.reshape(-1).tolist())
    assert len(labels) == 400 and set(labels.values()) == {1}
    assert data.ledger(n)["code"] == 50 and data.ledger(n)["text"] == n - 50


def test_another_process_and_another_start_see_the_same_batches(settings):
    first, second = open_data(settings()).training, open_data(settings()).training
    portion = Portion(1, 2, 3, BATCH)
    first.micro_batches(0, portion)
    for a, b in zip(first.micro_batches(24, portion), second.micro_batches(24, portion), strict=True):
        assert a.tokens.equal(b.tokens) and a.labels.equal(b.labels) and a.cu_seqlens.equal(b.cu_seqlens)


def test_another_seed_is_another_order(settings):
    a, b = (open_data(settings(), seed=seed).training for seed in (1, 2))
    assert rows([a.batch(range(40))]) != rows([b.batch(range(40))])


def test_documents_reach_the_batch(settings):
    batch = open_data(settings(document_mask="intra")).training.batch(range(24))
    # ids count up from a multiple of ten at each document's beginning
    starts = (batch.tokens % 10 == 0) | (torch.arange(S) == 0)
    assert (batch.position_ids == 0).equal(starts)
    assert (batch.loss_mask == 0).equal(batch.labels % 10 == 0)


def test_prefetching_changes_nothing(settings):
    data, portion = open_data(settings()).training, Portion(0, 2, 3, BATCH)
    ahead = data.prefetched(BATCH, portion)
    for step in range(1, 5):
        assert rows(next(ahead)) == rows(data.micro_batches(step * BATCH, portion))
    ahead.close()


def test_an_error_in_the_reading_thread_reaches_the_step(settings):
    config = settings()
    data = open_data(config).training
    # the tokens change under an open run
    with Path(f"{config.sources[0].path}.bin").open("r+b") as stream:
        stream.write(b"\xff" * 810)
    with pytest.raises(VocabularyError, match=r"data source code .*id 65535 at its position 0"):
        next(data.prefetched(0, Portion(0, 1, 12, BATCH)))


def test_a_new_blend_at_a_resume_keeps_what_was_and_goes_on(settings):
    config = settings()
    data = open_data(config).training
    saved = History.from_json(data.history.to_json(), origin="state.json")
    changed = config.model_copy(update={"sources": tuple(s.model_copy(update={"weight": 1.0}) for s in config.sources)})
    resumed = open_data(changed, history=saved, drawn=24).training
    assert rows([resumed.batch(range(24))]) == rows([data.batch(range(24))])
    assert data.ledger(24) == resumed.ledger(24) == {"code": 18, "text": 6}
    assert resumed.ledger(44) == {"code": 28, "text": 16}
    assert open_data(config, history=saved, drawn=24).training.history == saved


def test_changed_data_are_a_new_source(settings, tmp_path):
    config = settings()
    old = open_data(config).training
    source(tmp_path, "text", 500, 180)
    new = open_data(config, history=old.history, drawn=24).training
    ledger = new.ledger(48)
    former = next(name for name in ledger if name.startswith("text@"))
    assert ledger == {"code": 36, former: 6, "text": 6}
    with pytest.raises(DataError, match=r"earlier blend"):
        new.batch(range(24))


@pytest.mark.parametrize("change, message", [({"seed": 8}, r"run\.seed=8"), ({}, r"data\.sequence_length=4")])
def test_a_history_of_another_seed_or_length_is_refused(settings, change, message):
    history = open_data(settings()).training.history
    config = settings() if change else settings(sequence_length=4)
    with pytest.raises(ValueError, match=message):
        open_data(config, history=history, **change)


def test_more_epochs_than_allowed_are_refused_before_the_start(settings, tmp_path):
    config = settings()
    limited = config.sources[1].model_copy(update={"max_epochs": 2.0})
    config = config.model_copy(update={"sources": (config.sources[0], limited)})
    # text has 21 windows, and a quarter of the samples
    open_data(config, total_samples=168)
    with pytest.raises(ValueError, match=r"data\.sources: text: .*max_epochs=2"):
        open_data(config, total_samples=176)


def test_validation_is_the_same_in_every_layout_and_for_every_seed(settings):
    base = settings()
    validation = tuple(base.sources)
    config = settings(validation=validation, validation_samples=30)
    seen = []
    for seed, dp_size, micro in [(1, 1, 1), (2, 2, 3), (3, 4, 1)]:
        counted = []
        for held_out in open_data(config, seed=seed).validation:
            portions = [Portion(rank, dp_size, micro, BATCH) for rank in range(dp_size)]
            batches = [b for portion in portions for part in held_out.rounds(portion) for b in part]
            rows_that_count = [(b, j) for b in batches for j in range(micro) if b.loss_mask[j].sum() > 0]
            counted.append(sorted(int(b.tokens[j, 0]) for b, j in rows_that_count))
        seen.append(counted)
    # 30 asked for; the smaller source has 21
    assert seen[0] == seen[1] == seen[2] == [list(range(0, 240, 8)), list(range(500, 668, 8))]


def test_a_missing_file_is_named(settings, tmp_path):
    config = settings()
    (tmp_path / "text.idx").unlink()
    with pytest.raises(MissingDataError, match=r"text\.idx"):
        open_data(config)


def test_ids_beyond_the_vocabulary_are_refused_at_the_start(settings):
    with pytest.raises(VocabularyError, match=r"text\.bin.*model\.vocab_size=600"):
        open_data(settings(), vocab_size=600)


def test_the_same_data_twice_are_refused(settings, tmp_path):
    twins = [{"name": name, "path": source(tmp_path, name, 0, 100)} for name in ("a", "b")]
    with pytest.raises(ValueError, match="a and b hold the same data"):
        open_data(settings(sources=twins))


def test_a_tokenizer_of_another_vocabulary_is_refused_by_the_manifest(settings, tmp_path):
    made = [{"name": "a", "path": source(tmp_path, "a", 0, 100, tokenizer=b"one")}]
    with pytest.raises(VocabularyError, match=r"a\.manifest\.json.*1000 pieces.*model\.vocab_size=900"):
        open_data(settings(sources=made), vocab_size=900)


def test_sources_of_different_tokenizers_are_refused(settings, tmp_path):
    made = [
        {"name": "a", "path": source(tmp_path, "a", 0, 100, tokenizer=b"one")},
        {"name": "b", "path": source(tmp_path, "b", 0, 90)},
        {"name": "c", "path": source(tmp_path, "c", 0, 80, tokenizer=b"two")},
    ]
    with pytest.raises(VocabularyError, match=r"c\.manifest\.json.*a\.manifest\.json"):
        open_data(settings(sources=made))


def test_the_run_s_tokenizer_must_be_the_data_s(settings, tmp_path):
    made = [{"name": "a", "path": source(tmp_path, "a", 0, 100, tokenizer=b"one")}]
    (tmp_path / "hf").mkdir()
    for model in (tmp_path / "hf" / "tokenizer.model", tmp_path / "plain.model"):
        model.write_bytes(b"one")
    for fitting in (tmp_path / "hf", tmp_path / "plain.model"):
        open_data(settings(sources=made, tokenizer=fitting))
    (tmp_path / "plain.model").write_bytes(b"two")
    with pytest.raises(VocabularyError, match=r"data\.tokenizer="):
        open_data(settings(sources=made, tokenizer=tmp_path / "plain.model"))
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*no such file"):
        open_data(settings(sources=made, tokenizer=tmp_path / "none"))


def test_validation_data_are_checked_like_training_data(settings, tmp_path):
    config = settings(validation=[{"name": "v", "path": tmp_path / "absent"}])
    with pytest.raises(MissingDataError, match="absent"):
        open_data(config)
