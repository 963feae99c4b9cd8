"""Windows of a stream: every label once an epoch, another cut each epoch, borders where documents begin."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalemur.data.indexed import IndexedFile
from megalemur.data.windows import Windows, read_sample
from megalemur.data.writer import IndexedWriter


def stream(directory, lengths) -> IndexedFile:
    """Documents of these lengths; token k of the stream has id k."""
    with IndexedWriter(directory / "a", vocab_size=70000) as writer:
        for length in lengths:
            writer.add(range(writer.num_tokens, writer.num_tokens + length))
        writer.commit()
    return IndexedFile(directory / "a")


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), s=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_label_is_used_at_most_once_an_epoch_and_all_but_a_rest_are(tmp_path_factory, lengths, s, seed):
    file = stream(tmp_path_factory.mktemp("w"), lengths)
    total = file.num_tokens
    if total < s + 1:
        return
    source = Windows(file, s, seed=seed)
    n = source.samples_per_epoch
    for epoch in range(3):
        samples = [read_sample(source, i) for i in range(epoch * n, (epoch + 1) * n)]
        used = Counter(label for sample in samples for label in sample.tokens[1:].tolist())
        assert set(used.values()) == {1} and len(used) == total // s * s > total - s
        for sample in samples:
            first = int(sample.tokens[0])
            assert sample.tokens.tolist() == [(first + k) % total for k in range(s + 1)]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=12), s=st.integers(1, 12), i=st.integers(0, 50))
def test_borders_are_document_starts_and_the_end_of_the_stream(tmp_path_factory, lengths, s, i):
    file = stream(tmp_path_factory.mktemp("w"), lengths)
    if file.num_tokens < s + 1:
        return
    starts = {sum(lengths[:k]) for k in range(len(lengths))}
    sample = read_sample(Windows(file, s, seed=1), i)
    expected = [place for place, token in enumerate(sample.tokens.tolist()) if place > 0 and token in starts]
    assert sample.borders.tolist() == expected


def test_cuts_and_order_differ_by_epoch_by_seed_and_by_data(tmp_path):
    file = stream(tmp_path, [100, 107])
    (tmp_path / "other").mkdir()
    other = stream(tmp_path / "other", [101, 106])
    n = Windows(file, 8, seed=1).samples_per_epoch

    def epoch(source, e):
        return tuple(source.spans(i)[0].start for i in range(e * n, (e + 1) * n))

    sources = [Windows(file, 8, seed=1), Windows(file, 8, seed=2), Windows(other, 8, seed=1)]
    orders = [epoch(source, e) for source in sources for e in range(4)]
    assert len(set(orders)) == 12
    assert len({order[0] % 8 for order in orders}) > 1
    assert orders[0] == epoch(Windows(file, 8, seed=1), 0)


def test_without_a_seed_windows_come_as_they_stand_every_epoch(tmp_path):
    source = Windows(stream(tmp_path, [40]), 8, seed=None)
    assert [read_sample(source, i).tokens[0] for i in range(7)] == [0, 8, 16, 24, 32, 0, 8]
    assert source.spans(4) == [(32, 40), (0, 1)]


def test_samples_do_not_hold_on_to_the_file(tmp_path):
    sample = read_sample(Windows(stream(tmp_path, [40]), 8, seed=None), 0)
    assert sample.tokens.flags.owndata and sample.tokens.dtype == "int64"


def test_a_stream_shorter_than_a_window_is_refused(tmp_path):
    file = stream(tmp_path, [8])
    with pytest.raises(ValueError, match=r"a has 8 tokens.*data\.sequence_length \+ 1 = 9"):
        Windows(file, 8, seed=0)
    assert Windows(file, 7, seed=0).samples_per_epoch == 1
