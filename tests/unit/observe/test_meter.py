import pytest

from megalemur.observe.meter import Meter, Work
from megalemur.observe.throughput import FlopsPerToken

from .reports import report

FLOPS = FlopsPerToken(full_attention=4e9, causal_attention=3e9)


def work(**values):
    return Work(**{"devices": 4, "sequence_length": 25, "last_step": 10, "flops": FLOPS, **values})


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_rates_are_those_of_the_window_since_the_last_record():
    meter = Meter(work())
    meter.add(report(1, seconds=30.0))
    meter.record(report(1, seconds=30.0))
    for step in (2, 3):
        meter.add(report(step))
    record = meter.record(report(3))
    assert record["tokens_per_second"] == pytest.approx(200 / 4)
    assert record["tokens_per_second_per_device"] == pytest.approx(200 / 4 / 4)
    assert record["data_seconds"] == pytest.approx(0.5)


def test_utilisation_names_both_conventions():
    meter = Meter(work(peak_teraflops=0.1))
    meter.add(report())
    record = meter.record(report())
    # 50 tokens/s x 4 or 3 GFLOP over 4 devices of 0.1 TFLOP/s
    assert record["mfu_full_attention"] == pytest.approx(0.5)
    assert record["mfu_causal_attention"] == pytest.approx(0.375)


def test_no_utilisation_without_a_known_peak():
    meter = Meter(work())
    meter.add(report())
    assert not [name for name in meter.record(report()) if name.startswith("mfu")]


def test_the_slowest_rank_is_named():
    meter = Meter(work())
    step = report(seconds=5.0, rank_seconds=[1.0, 2.0, 4.0, 1.0])
    meter.add(step)
    record = meter.record(step)
    assert (record["rank_seconds_min"], record["rank_seconds_mean"], record["rank_seconds_max"]) == (1.0, 2.0, 4.0)
    assert record["slowest_rank"] == 2
    assert record["tokens_per_second"] == pytest.approx(100 / 5.0), "rates are those of whole steps"


def test_eta_counts_validation_and_saves_but_not_the_first_step():
    clock = Clock()
    meter = Meter(work(), clock=clock)
    clock.now += 60
    meter.add(report(1))
    assert meter.record(report(1))["eta_seconds"] == pytest.approx(9 * 2.0), "nothing but the step itself is known yet"
    clock.now += 2 + 3  # a step of 2 s and a save of 3 s
    meter.add(report(2))
    assert meter.record(report(2))["eta_seconds"] == pytest.approx(8 * 5.0)


def test_eta_is_zero_at_the_last_step():
    meter = Meter(work(last_step=1))
    meter.add(report(1))
    assert meter.record(report(1))["eta_seconds"] == 0


def test_skipped_steps_are_counted_over_all_windows():
    meter = Meter(work())
    meter.add(report(1, skipped=True))
    meter.record(report(1))
    meter.add(report(2, skipped=True))
    meter.add(report(3))
    record = meter.record(report(3))
    assert record["skipped_steps"] == 2
    assert record["skipped"] is False


def test_sources_have_samples_epochs_and_validation_losses():
    meter = Meter(work(epoch_samples={"code": 8, "gone": 5}))
    step = report(ledger={"code": 20, "text": 2}, validation={"text": 3.5})
    meter.add(step)
    record = meter.record(step)
    per_source = {name: value for name, value in record.items() if "/" in name}
    assert per_source == {"samples/code": 20, "samples/text": 2, "epochs/code": 2.5, "validation/text": 3.5}


def test_consumed_tokens_are_samples_times_their_length():
    meter = Meter(work())
    meter.add(report(3))
    assert meter.record(report(3))["tokens"] == 12 * 25


def test_save_seconds_are_reported_once():
    meter = Meter(work())
    meter.add(report(1))
    meter.add_save(1.5)
    assert meter.record(report(1))["save_seconds"] == 1.5
    meter.add(report(2))
    assert "save_seconds" not in meter.record(report(2))


def test_what_background_saves_took_and_how_many_failed_is_reported():
    meter = Meter(work())
    meter.add(report(1, save_write_seconds=2.5, failed_saves=1))
    record = meter.record(report(1))
    assert record["save_write_seconds"] == 2.5 and record["failed_saves"] == 1
    meter.add(report(2))
    record = meter.record(report(2))
    assert "save_write_seconds" not in record and record["failed_saves"] == 1, "counted over all windows"


def test_device_facts_enter_the_record():
    meter = Meter(work(), device_facts=lambda: {"peak_memory_bytes": 7})
    meter.add(report())
    assert meter.record(report())["peak_memory_bytes"] == 7


def test_eta_is_none_the_shorter_for_a_rollback():
    clock = Clock()
    meter = Meter(work(), clock=clock)
    for step in (5, 6, 7, 4):  # back from 7 to 3
        meter.add(report(step))
        clock.now += 10.0
    clock.now -= 10.0
    assert meter.record(report(4))["eta_seconds"] == pytest.approx(6 * 10.0)
