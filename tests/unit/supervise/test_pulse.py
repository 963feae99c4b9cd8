"""Heartbeats, requests to stop and deadlines, between a process and its fork."""

import os
import signal
import time

import pytest

from megalemur.supervise import signals
from megalemur.supervise.deadline import deadline
from megalemur.supervise.pulse import Pulse, Section
from megalemur.supervise.signals import STOP_SIGNALS, Heard, StopRequest


def where(pulse):
    beat = pulse.read()
    return beat.section, beat.steps


def test_a_run_goes_through_its_sections():
    pulse = Pulse()
    assert where(pulse) == (Section.SETUP, 0)
    seen = []
    for step in range(40, 44):
        pulse.step(step)
        seen.append(where(pulse))
    assert seen == [(Section.FIRST_STEPS, 40), (Section.FIRST_STEPS, 41), (Section.STEP, 42), (Section.STEP, 43)]
    with pulse.during(Section.SAVE, 44):
        assert where(pulse) == (Section.SAVE, 44)
    assert where(pulse) == (Section.STEP, 43)
    with pytest.raises(OSError), pulse.during(Section.SAVE, 44):
        raise OSError
    assert where(pulse) == (Section.STEP, 43)
    pulse.enter(Section.ENDING)
    assert where(pulse) == (Section.ENDING, 43)


def test_steps_and_the_end_are_watched_and_nothing_else():
    assert {section for section in Section if not section.is_slow} == {Section.STEP, Section.ENDING}


def test_a_fork_is_seen():
    pulse = Pulse()
    pid = os.fork()
    if pid == 0:
        pulse.step(7)
        while not pulse.stop_asked:
            time.sleep(0.01)
        os._exit(5)
    limit = time.monotonic() + 5
    while pulse.read().steps != 7 and time.monotonic() < limit:
        time.sleep(0.01)
    assert where(pulse) == (Section.FIRST_STEPS, 7)
    pulse.ask_to_stop()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


@pytest.fixture
def heard():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield Heard()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_to_stop_and_wakes_the_supervisor(heard, number):
    pulse = Pulse()
    with StopRequest(pulse, wakeup=heard.wakeup) as stop:
        assert not stop.heard
        os.kill(os.getpid(), number)
        assert stop.heard and pulse.stop_asked
    assert heard.count() == 1 and heard.names == [number.name]


def test_signals_close_together_are_one_request(heard, monkeypatch):
    with StopRequest(Pulse(), wakeup=heard.wakeup):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            assert heard.count() == 1
    os.kill(os.getpid(), signal.SIGTERM)  # the supervisor's own
    assert heard.count() == 1
    monkeypatch.setattr(signals, "SAME_SECONDS", 0.0)
    os.kill(os.getpid(), signal.SIGINT)
    assert heard.count() == 2 and heard.names == ["SIGTERM", "SIGINT"]


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest():
        pass
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_deadline_that_has_passed_is_a_request():
    assert StopRequest(deadline=time.time() - 1).heard
    assert not StopRequest(deadline=time.time() + 60).heard


def test_the_deadline_comes_from_the_batch_system(monkeypatch):
    for name in ("MEGALEMUR_JOB_END", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    assert deadline(60.0) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    assert (deadline(60.0), deadline(None), deadline(0.0)) == (940.0, None, 1000.0)
    monkeypatch.setenv("MEGALEMUR_JOB_END", "2000")
    assert deadline(60.0) == 1940.0
    monkeypatch.setenv("MEGALEMUR_JOB_END", "tomorrow")
    with pytest.raises(ValueError, match="MEGALEMUR_JOB_END=tomorrow"):
        deadline(60.0)
    assert deadline(None) is None
