"""The observers on a CPU: garbage collection, profiler, metrics, and which of them a rank gets."""

import gc
import json
import weakref

import orjson
import pytest
import torch

from megalemur.config.log import ProfilerConfig
from megalemur.observe.build import build_observers
from megalemur.observe.garbage import AlignedGarbageCollection
from megalemur.observe.memory import cuda_memory
from megalemur.observe.profiler import StepProfiler

from .reports import report, run_config


class Node:
    def __init__(self):
        self.me = self


@pytest.fixture(autouse=True)
def _automatic_collection():
    yield
    gc.enable()
    gc.unfreeze()


def garbage():
    return weakref.ref(Node())


def test_garbage_is_collected_at_the_due_step_and_not_before():
    observer = AlignedGarbageCollection(every=3)
    dead = garbage()
    for step in (1, 2):
        observer.after_step(report(step))
    assert dead() is not None and not gc.isenabled()
    observer.after_step(report(3))
    assert dead() is None


def test_what_was_there_before_is_set_aside_until_the_end(tmp_path):
    node = Node()
    old = weakref.ref(node)
    observer = AlignedGarbageCollection(every=1)
    del node
    observer.at_save(1, tmp_path, 0.1)
    assert old() is not None and gc.get_freeze_count()
    observer.at_end()
    assert not gc.get_freeze_count() and gc.collect() and old() is None


def test_a_save_collects_old_objects_too(tmp_path):
    observer = AlignedGarbageCollection(every=1)
    node = Node()
    gc.collect()  # it is old now
    old = weakref.ref(node)
    del node
    observer.after_step(report(1))
    assert old() is not None
    observer.at_save(1, tmp_path, 0.1)
    assert old() is None


def test_automatic_collection_comes_back_at_the_end():
    observer = AlignedGarbageCollection(every=1)
    observer.at_end()
    assert gc.isenabled()


def steps_of(path):
    events = json.loads(path.read_text())["traceEvents"]
    return sorted({event["name"] for event in events if str(event.get("name", "")).startswith("step-")})


def profiled(path, *, first_step=0, last_step=6):
    observer = StepProfiler(ProfilerConfig(start_step=2, steps=2), path=path, first_step=first_step)
    for step in range(first_step, last_step):
        with torch.profiler.record_function(f"step-{step}"):
            torch.ones(2) + 1
        observer.after_step(report(step + 1))
    observer.at_end()


def test_the_profiler_records_its_window_and_nothing_else(tmp_path):
    profiled(tmp_path / "profile" / "trace.json")
    assert steps_of(tmp_path / "profile" / "trace.json") == ["step-2", "step-3"]


def test_a_window_that_the_end_cuts_short_is_written(tmp_path):
    profiled(tmp_path / "trace.json", last_step=3)
    assert steps_of(tmp_path / "trace.json") == ["step-2"]


def test_a_resume_behind_the_window_says_so(tmp_path, caplog):
    profiled(tmp_path / "trace.json", first_step=4)
    assert not (tmp_path / "trace.json").exists()
    assert "log.profiler.start_step=2 has passed" in caplog.text


def test_a_trace_that_cannot_be_written_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file where the directory should be")
    profiled(tmp_path / "profile" / "trace.json")
    assert "the profile cannot be written" in caplog.text


def test_there_is_no_cuda_memory_on_a_cpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert cuda_memory() == {}


def kinds(observers):
    return [type(observer).__name__ for observer in observers]


def test_rank_zero_has_the_metrics_and_chosen_ranks_the_profiler(tmp_path):
    config = run_config(tmp_path, "log.profiler={start_step: 2, ranks: [1]}")
    at_zero = build_observers(config, rank=0, label="tp0 pp0 dp0", first_step=0)
    at_one = build_observers(config, rank=1, label="tp1 pp0 dp0", first_step=0)
    assert kinds(at_zero) == ["AlignedGarbageCollection", "Metrics"]
    assert kinds(at_one) == ["AlignedGarbageCollection", "StepProfiler"]


def watch(config, first_step, reports, **more):
    observers = build_observers(config, rank=0, label="tp0 pp0 dp0", first_step=first_step, **more)
    for one in reports:
        for observer in observers:
            observer.after_step(one)
    for observer in observers:
        observer.at_end()


def records(directory):
    return [orjson.loads(line) for line in (directory / "metrics.jsonl").read_bytes().splitlines()]


def test_records_are_written_when_due_at_validations_and_at_the_last_step(tmp_path):
    validation = {"code": 3.0}
    reports = [report(step, validation=validation if step == 6 else {}) for step in range(1, 11)]
    watch(run_config(tmp_path, "log.every=4"), 0, reports)
    assert [record["step"] for record in records(tmp_path)] == [4, 6, 8, 10]
    assert records(tmp_path)[1]["validation/code"] == 3.0


def test_a_resumed_run_appends_and_reports_epochs(tmp_path):
    config = run_config(tmp_path)
    watch(config, 0, [report(1), report(2)])
    watch(config, 1, [report(2, ledger={"code": 8})], epoch_samples={"code": 16})
    assert [(r["step"], r.get("resumed_from")) for r in records(tmp_path)] == [(1, None), (2, None), (2, 1)]
    assert records(tmp_path)[-1]["epochs/code"] == 0.5


def test_tensorboard_events_are_written_where_wanted(tmp_path):
    watch(run_config(tmp_path, "log.tensorboard=true"), 0, [report(1)])
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_peak_teraflops_of_the_run_file_gives_utilisation(tmp_path):
    watch(run_config(tmp_path, "log.peak_teraflops=0.01"), 0, [report(1)])
    record = records(tmp_path)[0]
    assert 0 < record["mfu_causal_attention"] < record["mfu_full_attention"]


def test_events_are_written_when_they_happen_and_records_when_they_are_due(tmp_path):
    from megalemur.observe.observer import Event

    config = run_config(tmp_path, "log.every=5")
    observers = build_observers(config, rank=0, label="tp0 pp0 dp0", first_step=0)
    event = Event("spike", "loss 9", {"rejected_in_a_row": 1})
    for step in range(1, 6):
        for observer in observers:
            observer.after_step(report(step, events=[event] if step == 2 else []))
    for observer in observers:
        observer.at_end()
    lines = [orjson.loads(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]
    assert [(line["step"], line.get("event")) for line in lines] == [(2, "spike"), (5, None)]
    assert (lines[0]["text"], lines[0]["rejected_in_a_row"]) == ("loss 9", 1)
