import json
import re
from pathlib import Path

import pytest

from megalemur.checkpoint.directory import open_manifest
from megalemur.cli import exit_codes
from megalemur.cli.failures import code_of, reported, text_for
from megalemur.config.guard import GuardConfig
from megalemur.config.load import parse_run
from megalemur.data.indexed import IndexedFile
from megalemur.observe.observer import Event
from megalemur.supervise.endings import CHOSEN, Ending
from megalemur.train.guard import Guard, Verdict
from megalemur.train.rollback import check_patience
from megalemur.train.state import RunState

BAD_RUN = "run: {name: x, steps: 1, stps: 2}\nmodel: {preset: tiny}"


def caught(call, *args):
    with pytest.raises(Exception) as info:
        call(*args)
    return info.value


def find_replicas_apart():
    guard = Guard(GuardConfig(), compare_replicas=lambda: [Event("replicas", "rank 3 differs")])
    assert guard.judge(1.0, 1.0) is Verdict.STOP
    guard.give_up()


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda directory: parse_run(BAD_RUN), exit_codes.BAD_CONFIG),
        (lambda directory: IndexedFile(directory / "absent"), exit_codes.BAD_DATA),
        (lambda directory: open_manifest(directory), exit_codes.NO_GOOD_CHECKPOINT),
        (lambda directory: check_patience(GuardConfig(max_rollbacks=0), RunState()), exit_codes.NUMERICAL_STOP),
        (lambda directory: find_replicas_apart(), exit_codes.REPLICAS_DIFFER),
        (lambda directory: Ending("hung", 0, "why").finish(), exit_codes.HANG),
        (lambda directory: Ending("died", 0, "why").finish(), exit_codes.RANK_DIED),
        (lambda directory: Ending("twice", 0, "why").finish(), exit_codes.STOPPED_TWICE),
    ],
    ids=["config", "data", "checkpoint", "numbers", "replicas", "hang", "death", "twice"],
)
def test_each_room_s_error_has_its_code(call, code, tmp_path):
    assert code_of(caught(call, tmp_path)) == code


@pytest.mark.parametrize("call", [lambda: json.loads("{"), lambda: {}["key"]], ids=["library", "mistake"])
def test_a_mistake_of_ours_has_no_code(call):
    assert code_of(caught(call)) is None


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(json.JSONDecodeError):
        reported(lambda: json.loads("{"))()


def said(capsys):
    with pytest.raises(SystemExit) as info:
        reported(lambda: parse_run(BAD_RUN))()
    return info.value.code, capsys.readouterr().err


def test_rank_zero_prints_every_problem(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    code, text = said(capsys)
    assert code == exit_codes.BAD_CONFIG
    assert "run.stps: no such setting; did you mean run.steps?" in text
    assert "optim.learning_rate: not given" in text


def test_other_ranks_print_one_line(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    code, text = said(capsys)
    assert code == exit_codes.BAD_CONFIG
    assert text.count("\n") == 1
    assert text.startswith("megalemur: rank 3: ")


def test_an_error_without_words_is_named():
    assert text_for(1, ValueError()) == "rank 1: ValueError"


def test_exit_codes_are_distinct_chosen_and_documented():
    codes = {name: code for name, code in vars(exit_codes).items() if name.isupper()}
    assert len(set(codes.values())) == len(codes)
    assert all(code in CHOSEN for name, code in codes.items() if name != "DONE")
    text = (Path(__file__).parents[3] / "docs/running.md").read_text()
    assert set(re.findall(r"^\| (\d+) \|", text, re.MULTILINE)) == {str(code) for code in codes.values()} | {"1"}
