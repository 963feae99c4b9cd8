import orjson
import pytest

from megalemur.parallel.groups import join
from megalemur.train.crash_loop import STARTS, CrashLoop, refuse_crash_loop, starts_in_a_row
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run


def lines(*steps):
    return b"".join(orjson.dumps({"step": step, "time": 1.5, "host": "h"}) + b"\n" for step in steps)


@pytest.mark.parametrize(
    ("steps", "count"), [((), 0), ((5,), 1), ((5, 5, 5), 3), ((5, 5, 7), 0), ((5, 7, 5), 1), ((0, 5, 5), 2)]
)
def test_only_the_newest_starts_from_the_same_step_count(tmp_path, steps, count):
    (tmp_path / STARTS).write_bytes(lines(*steps))
    assert starts_in_a_row(tmp_path / STARTS, 5) == count


def test_without_a_file_nothing_was_started(tmp_path):
    assert starts_in_a_row(tmp_path / STARTS, 5) == 0


@pytest.mark.parametrize("torn", [b'{"step": 5, "ti', b"\xff\xfe\x00", b"[1]\n", b'{"step": "5"}\n', b"\n\n", b"{}"])
def test_a_torn_line_neither_counts_nor_hides_the_others(tmp_path, torn):
    path = tmp_path / STARTS
    path.write_bytes(lines(5, 5) + torn)
    assert starts_in_a_row(path, 5) == 2


def start_again(config, steps):
    place, said = join(config.parallel, timeout_seconds=60), []
    for step in steps:
        try:
            refuse_crash_loop(config.checkpoint.directory, step, place)
            said.append("")
        except CrashLoop as error:
            said.append(str(error))
    return said


def test_all_ranks_refuse_alike_and_progress_counts_anew(tmp_path):
    config = tiny_run(tmp_path, "parallel.data=2")
    torn = config.checkpoint.directory / STARTS
    torn.parent.mkdir()
    torn.write_bytes(lines(4) + b'{"step": 4, "t')
    said, other = run_ranks(2, start_again, config, [4, 4, 4, 5, 5, 5, 5, 6])
    assert said == other
    assert [bool(text) for text in said] == [False, False, True, False, False, False, True, False]
    assert f"delete {torn}" in said[2] and "from step 4" in said[2]
    kept = [line for line in torn.read_bytes().splitlines() if line.endswith(b"}")]
    assert [orjson.loads(line)["step"] for line in kept] == [4, 4, 4, 5, 5, 5, 6], "a refused start is no start"
