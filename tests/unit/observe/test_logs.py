import logging
import subprocess
import sys

import pytest

from megalemur.observe.logs import coordinate_formatter, setup_logging


@pytest.fixture(autouse=True)
def _root_logger_as_before():
    root, ours = logging.getLogger(), logging.getLogger("megalemur")
    handlers, level = list(root.handlers), ours.level
    yield
    root.handlers[:] = handlers
    ours.setLevel(level)


def heard(capsys, rank):
    setup_logging("tp1 pp0 dp3", rank)
    ours = logging.getLogger("megalemur.train")
    ours.info("quiet")
    ours.warning("loud")
    logging.getLogger("elsewhere").info("library")
    return capsys.readouterr().err


def test_rank_zero_says_info_and_the_others_only_warnings(capsys):
    assert ("quiet" in heard(capsys, 0), "quiet" in heard(capsys, 1)) == (True, False)
    assert "loud" in heard(capsys, 1)


def test_info_of_libraries_is_not_heard(capsys):
    assert "library" not in heard(capsys, 0)


def test_every_line_carries_the_coordinates(capsys):
    assert "[tp1 pp0 dp3] WARNING megalemur.train: loud" in heard(capsys, 1)


def test_a_second_call_replaces_the_first(capsys):
    setup_logging("tp0 pp0 dp0", 0)
    assert heard(capsys, 0).count("loud") == 1


def test_percent_signs_in_a_label_are_text():
    line = logging.makeLogRecord({"msg": "text", "name": "n", "levelname": "INFO"})
    assert "[100%s]" in coordinate_formatter("100%s").format(line)


def test_log_goes_to_stderr_where_there_is_no_terminal():
    code = (
        "import logging\nfrom megalemur.observe.logs import setup_logging\nsetup_logging('tp0 pp0 dp0', 0)\n"
        "logging.getLogger('megalemur').info('hello')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "hello" in done.stderr
