import logging
import resource
from contextlib import contextmanager

import orjson
import pytest

from megalemur.observe.sinks import Guarded, JsonLines, TensorBoard


def lines_of(path):
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


@contextmanager
def largest_file(size):
    """A full disk: writes stop in the middle at `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_record_is_on_disk_when_write_returns(tmp_path):
    sink = JsonLines(tmp_path / "log" / "metrics.jsonl")
    sink.write({"step": 1, "loss": 2.5})
    assert lines_of(tmp_path / "log" / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]


def test_a_resume_keeps_every_line_and_marks_its_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for step in (1, 2, 3):
        first.write({"step": step})
    first.close()
    second = JsonLines(path, resumed_from=2)
    second.write({"step": 3})
    second.write({"step": 4})
    assert lines_of(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 3, "resumed_from": 2}, {"step": 4}]


def test_a_torn_last_line_does_not_swallow_the_next_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"st')
    JsonLines(path).write({"step": 2})
    assert path.read_bytes() == b'{"step":1}\n{"st\n{"step":2}\n'


def test_loss_that_is_not_finite_stays_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).write({"step": 1, "loss": float("nan")})
    assert lines_of(path) == [{"step": 1, "loss": None}]


def test_a_record_that_does_not_fit_leaves_no_half_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, resumed_from=7)
    with largest_file(10), pytest.raises(OSError, match=r"part of a line"):
        sink.write({"step": 8})
    assert path.read_bytes() == b""
    sink.write({"step": 9})
    assert lines_of(path) == [{"step": 9, "resumed_from": 7}]


def test_a_full_disk_warns_once_and_says_when_it_is_over(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    sink = Guarded("metrics.jsonl", lambda: JsonLines(path))
    with caplog.at_level(logging.WARNING), largest_file(4):
        for step in (1, 2, 3):
            sink.write({"step": step})
        assert len(caplog.records) == 1
        assert "metrics.jsonl cannot be written" in caplog.text
    sink.write({"step": 4})
    assert "3 records were lost" in caplog.text
    assert lines_of(path) == [{"step": 4}]


def test_a_sink_that_cannot_be_opened_warns_and_is_tried_again(tmp_path, caplog):
    blocked = tmp_path / "log"
    blocked.write_text("a file where the directory should be")
    sink = Guarded("metrics.jsonl", lambda: JsonLines(blocked / "metrics.jsonl"))
    assert "metrics.jsonl cannot be opened" in caplog.text
    blocked.unlink()
    sink.write({"step": 5})
    sink.close()
    assert lines_of(blocked / "metrics.jsonl") == [{"step": 5}]


def scalars_of(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_takes_the_numbers_and_a_resume_hides_what_it_repeats(tmp_path):
    first = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": float(step), "time": "now"})
    first.close()
    second = TensorBoard(tmp_path, resumed_from=2)
    second.write({"step": 3, "loss": 30.0, "skipped": False})
    second.close()
    assert scalars_of(tmp_path) == {"loss": [(1, 1.0), (2, 2.0), (3, 30.0)], "skipped": [(3, 0.0)]}


def test_an_event_is_a_line_of_its_own_among_the_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = Guarded("metrics", lambda: JsonLines(path))
    sink.write({"step": 1, "loss": 2.5})
    sink.tell({"step": 2, "event": "spike", "text": "loss 9", "loss": 9.0})
    assert lines_of(path)[1] == {"step": 2, "event": "spike", "text": "loss 9", "loss": 9.0}


def test_an_event_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "log").write_text("a file where a directory is wanted")
    Guarded("metrics", lambda: JsonLines(tmp_path / "log" / "metrics.jsonl")).tell({"step": 2, "event": "skip"})
    assert "records are lost" in caplog.text
