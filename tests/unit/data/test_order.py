"""The deal of samples to sources: shares, ledger, blend changes, skipped ranges."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalemur.data.errors import DataError
from megalemur.data.history import History, Share
from megalemur.data.order import Deal, Order

# weights over twelve orders of magnitude, ties among them
WEIGHTS = st.lists(
    st.one_of(st.integers(1, 10), st.integers(1, 10**12), st.sampled_from([1, 10**6])), min_size=1, max_size=12
).map(lambda weights: {f"s{k:02}": weight for k, weight in enumerate(weights)})


def shares(**weights) -> tuple[Share, ...]:
    return tuple(Share(key=key, name=key, weight=str(weight)) for key, weight in weights.items())


def deal(order: Order, start: int, stop: int) -> list[tuple[str, int]]:
    return [tuple(order(n)) for n in range(start, stop)]


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS)
def test_after_any_number_of_samples_each_source_is_within_two_of_its_share(weights):
    order, total = Deal(weights), sum(weights.values())
    counts = dict.fromkeys(weights, 0)
    for m in range(400):
        key, ordinal = order(m)
        assert ordinal == counts[key]
        counts[key] += 1
        assert all(abs(counts[key] * total - (m + 1) * weight) < 2 * total for key, weight in weights.items())
    assert order.counts(400) == counts


@settings(max_examples=200, deadline=None)
@given(weights=WEIGHTS, m=st.integers(0, 10**13))
def test_shares_hold_far_into_a_run_too(weights, m):
    order, total = Deal(weights), sum(weights.values())
    before, after = order.counts(m), order.counts(m + 1)
    assert sum(before.values()) == m
    assert all(abs(before[key] * total - m * weight) < 2 * total for key, weight in weights.items())
    key, ordinal = order(m)
    assert ordinal == before[key] and after == {**before, key: ordinal + 1}


def test_a_tiny_weight_gets_its_sample_and_not_more():
    counts = Order(History.begin(0, 8, shares(big=1.0, tiny=1e-6))).counts(10_000_000)
    assert counts == {"big": 9_999_990, "tiny": 10}


def test_ten_to_one_is_dealt_ten_to_one_in_every_stretch():
    order = Order(History.begin(0, 8, shares(code=10.0, text=1.0)))
    for start in range(0, 110, 7):
        assert sum(key == "text" for key, _ in deal(order, start, start + 11)) == 1


def test_weights_are_their_decimal_text_and_only_their_ratio_counts():
    tenths, whole = shares(a=0.1, b=0.2, c=1e-1), shares(a=1, b=2, c=1)
    histories = [History.begin(0, 8, blend) for blend in (tenths, whole)]
    assert histories[0].blends[0].integer_weights() == {"a": 1, "b": 2, "c": 1}
    assert deal(Order(histories[0]), 0, 50) == deal(Order(histories[1]), 0, 50)


def test_the_order_in_which_sources_are_listed_means_nothing():
    a = Order(History.begin(0, 8, shares(x=3, y=1, z=1)))
    b = Order(History.begin(0, 8, shares(z=1, y=1, x=3)))
    assert deal(a, 0, 100) == deal(b, 0, 100)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_after_a_change_of_blend_every_source_goes_on_where_it_stood(data):
    first = shares(a=data.draw(st.integers(1, 50)), b=data.draw(st.integers(1, 50)))
    second = shares(b=data.draw(st.integers(1, 50)), c=data.draw(st.integers(1, 50)), a="0.5")
    at = data.draw(st.integers(0, 100))
    old = History.begin(0, 8, first)
    new = old.with_blend(at, second)
    assert deal(Order(new), 0, at) == deal(Order(old), 0, at)
    seen = {key: [] for key in "abc"}
    for n in range(200):
        assert Order(new).counts(n) == {**Order(new).counts(n), **{k: len(v) for k, v in seen.items() if v}}
        key, ordinal = Order(new)(n)
        seen[key].append(ordinal)
    assert all(ordinals == list(range(len(ordinals))) for ordinals in seen.values())


def test_each_source_is_within_four_of_its_share_across_a_change():
    history = History.begin(0, 8, shares(a=7, b=5, c=3, d=1)).with_blend(101, shares(a=1, b=1, c=1, d=10))
    order = Order(history)
    for n in range(101, 400):
        for key, before, after in (("a", 7, 1), ("b", 5, 1), ("c", 3, 1), ("d", 1, 10)):
            share = Fraction(101 * before, 16) + Fraction((n - 101) * after, 13)
            assert abs(order.counts(n)[key] - share) < 4


def test_the_same_weights_are_no_change():
    history = History.begin(0, 8, shares(a=10, b=1))
    assert history.with_blend(500, shares(b=0.1, a=1.0)) == history
    changed = history.with_blend(500, shares(a=1, b=1))
    assert changed.with_blend(900, shares(a=2, b=2)) == changed
    assert len(changed.blends) == 2


def test_a_change_at_the_same_sample_replaces_the_earlier_one():
    history = History.begin(0, 8, shares(a=1)).with_blend(5, shares(b=1)).with_blend(5, shares(c=1))
    assert deal(Order(history), 4, 6) == [("a", 4), ("c", 0)]


def test_going_back_to_the_old_blend_is_a_third_blend():
    one, two = shares(a=1, b=1), shares(a=1, b=3)
    history = History.begin(0, 8, one).with_blend(10, two).with_blend(20, one)
    assert [blend.begins for blend in history.blends] == [0, 10, 20]


def test_skipped_samples_are_passed_over_and_the_rest_keep_their_place():
    plain = History.begin(0, 8, shares(a=2, b=1))
    skipping = plain.with_skip(10, 12, 15).with_skip(11, 20, 22)
    whole = deal(Order(plain), 0, 40)
    assert skipping.skipped == ((12, 15), (23, 25))
    assert deal(Order(skipping), 0, 35) == whole[:12] + whole[15:23] + whole[25:]


def test_skips_that_touch_or_overlap_become_one():
    history = History.begin(0, 8, shares(a=1)).with_skip(0, 10, 20)
    assert history.with_skip(5, 10, 15).skipped == ((10, 25),)
    assert history.with_skip(5, 5, 12).skipped == ((5, 22),)
    assert deal(Order(history.with_skip(5, 5, 12)), 4, 6) == [("a", 4), ("a", 22)]


def test_the_ledger_counts_what_was_passed_over():
    order = Order(History.begin(0, 8, shares(a=1)).with_skip(0, 5, 8))
    assert [order.counts(n)["a"] for n in (0, 5, 6)] == [0, 5, 9]


def test_a_blend_after_a_skip_begins_at_the_right_sample():
    history = History.begin(0, 8, shares(a=1)).with_skip(0, 5, 8).with_blend(6, shares(b=1))
    assert deal(Order(history), 4, 8) == [("a", 4), ("a", 8), ("b", 0), ("b", 1)]
    assert Order(history).counts(8) == {"a": 9, "b": 2}


@pytest.mark.parametrize("first, last", [(9, 12), (12, 12), (13, 12)])
def test_a_skip_of_the_past_or_of_nothing_is_refused(first, last):
    with pytest.raises(ValueError, match="cannot be skipped after 10"):
        History.begin(0, 8, shares(a=1)).with_skip(10, first, last)


def test_a_history_comes_back_from_json_text():
    import json

    history = History.begin(3, 8, shares(a=1e-6, b=2)).with_blend(7, shares(c=1)).with_skip(8, 9, 11)
    assert History.from_json(json.loads(json.dumps(history.to_json())), origin="state.json") == history


def broken(change) -> dict:
    values = History.begin(3, 8, shares(a=1, b=2)).to_json()
    change(values)
    return values


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(format=2),
        lambda v: v.pop("seed"),
        lambda v: v.update(extra=1),
        lambda v: v.update(blends=[]),
        lambda v: v["blends"][0].update(begins=4),
        lambda v: v["blends"].append(v["blends"][0]),
        lambda v: v["blends"][0].update(shares=[]),
        lambda v: v["blends"][0]["shares"][0].update(weight="0.0"),
        lambda v: v["blends"][0]["shares"][0].update(weight="1/0"),
        lambda v: v["blends"][0]["shares"][0].update(key="b"),
        lambda v: v.update(skipped=[[5, 5]]),
        lambda v: v.update(skipped=[[5, 9], [7, 12]]),
        lambda v: v.clear(),
    ],
)
def test_a_damaged_history_is_refused_with_its_origin(change):
    with pytest.raises(DataError, match=r"state\.json: data history"):
        History.from_json(broken(change), origin="state.json")
