"""What a supervisor does that cannot reach rank 0's."""

import socket
import time

import pytest

from megalemur.supervise import office
from megalemur.supervise.endings import Ending
from megalemur.supervise.office import Away, Setting


@pytest.fixture
def setting():
    with socket.socket() as probe:  # bound and never listening: nobody else gets the port
        probe.bind(("127.0.0.1", 0))
        yield Setting(rank=1, world_size=2, address=probe.getsockname(), token="t", launcher=None)


def order_of(away):
    order = away.poll(0.0)
    return None if order is None else Ending.from_json(order)


def test_it_waits_as_long_as_ranks_may_take_to_meet_and_no_longer(setting):
    assert order_of(Away(setting, join_seconds=60.0)) is None
    away = Away(setting, join_seconds=0.0)
    time.sleep(0.01)
    assert order_of(away).kind == "died"


@pytest.mark.parametrize(
    ("message", "kind", "code"),
    [
        ({"is": "ended", "code": 12}, "code", 12),
        ({"is": "ended", "code": 0}, "died", 0),
        ({"is": "ended", "code": -9}, "died", 0),
        ({"is": "status", "overdue": True, "age": 60.0}, "hung", 0),
    ],
)
def test_something_grave_that_nobody_hears_is_acted_on_alone(setting, monkeypatch, message, kind, code):
    away = Away(setting, join_seconds=60.0)
    away.send({"overdue": False, **message})
    assert order_of(away) is None
    monkeypatch.setattr(office, "_UNREACHED_SECONDS", 0.0)
    ending = order_of(away)
    assert (ending.kind, ending.code) == (kind, code)


def test_a_second_request_does_not_wait_for_anybody(setting):
    away = Away(setting, join_seconds=60.0)
    away.send({"is": "twice", "text": "SIGTERM", "overdue": False})
    assert order_of(away).kind == "twice"


def test_a_stall_that_is_over_is_forgotten(setting, monkeypatch):
    monkeypatch.setattr(office, "_UNREACHED_SECONDS", 0.0)
    away = Away(setting, join_seconds=60.0)
    for overdue in (True, False):
        away.send({"is": "status", "overdue": overdue, "age": 60.0})
    assert order_of(away) is None


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT", "MEGALEMUR_SUPERVISOR_PORT"])
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "many")
    with pytest.raises(ValueError, match=f"{name}=many"):
        Setting.from_environment()
