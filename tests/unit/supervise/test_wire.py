"""Supervisors hear each other, and nobody else."""

import contextlib
import socket
import threading
import time

import pytest

from megalemur.supervise.wire import Caller, Listener

TOKEN = "a secret"


@pytest.fixture
def listener():
    this = Listener(("127.0.0.1", 0), TOKEN)
    yield this
    this.close(0.0)


def heard_by(listener, enough=1, seconds=5.0):
    found, deadline = [], time.monotonic() + seconds
    while len(found) < enough and time.monotonic() < deadline:
        found += listener.poll(0.05)
    return found


def caller(listener, rank=1, token=TOKEN):
    return Caller(("127.0.0.1", listener.port), {"rank": rank, "token": token})


def test_what_is_said_before_the_connection_is_heard_too(listener):
    this = caller(listener)
    for number in range(3):
        this.send({"is": "status", "n": number})
    assert not this.connected
    this.poll(0.0)
    this.send({"is": "status", "n": 3})
    assert [message["n"] for rank, message in heard_by(listener, 4)] == [0, 1, 2, 3]


def test_orders_arrive_and_the_end_of_rank_zero_is_noticed(listener):
    this = caller(listener)
    this.send({"is": "status"})
    this.poll(0.0)
    heard_by(listener)
    listener.lines[1].send({"do": "dump"})
    assert list(this.poll(1.0)) == [{"do": "dump"}]
    listener.lines[1].send({"do": "end"})
    listener.close(0.0)
    assert list(this.poll(1.0)) == [{"do": "end"}], "the last order is read before the end"
    this.poll(1.0)
    assert this.lost


def test_the_end_of_a_supervisor_is_noticed(listener):
    this = caller(listener)
    this.send({"is": "status"})
    this.poll(0.0)
    heard_by(listener)
    this.close()
    listener.poll(1.0)
    assert listener.lines[1].lost


def test_closing_waits_until_the_others_have_gone(listener):
    this = caller(listener)
    this.send({"is": "status"})
    this.poll(0.0)
    heard_by(listener)
    listener.lines[1].send({"do": "end"})
    read = []
    reader = threading.Thread(target=lambda: (time.sleep(0.3), read.extend(this.poll(1.0)), this.close()))
    reader.start()
    listener.close(10.0)
    assert read == [{"do": "end"}]
    reader.join()


@pytest.mark.parametrize(
    "sent",
    [
        b'{"rank": 1, "token": "wrong"}\n{"is": "twice", "text": "x"}\n',
        b'{"rank": 1}\n{"is": "twice", "text": "x"}\n',
        b'{"is": "twice", "text": "x"}\n',
        b'{"rank": "1", "token": "a secret"}\n{"is": "twice"}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 30000 + b"\n",
        b"x" * 200_000,
        b"\xff\xfe\n",
        b'{"rank": NaN}\n',
    ],
)
def test_strangers_and_nonsense_are_hung_up_on(listener, sent):
    with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
        stranger.settimeout(5)
        stranger.sendall(sent)
        assert heard_by(listener, seconds=0.5) == []
        assert listener.lines == {}
        with contextlib.suppress(ConnectionResetError):  # hung up on with words unread
            assert stranger.recv(1) == b""


def test_nobody_takes_the_place_of_a_rank_that_is_there(listener):
    first, second = caller(listener), caller(listener)
    for this in (first, second):
        this.send({"is": "status"})
        this.poll(0.0)
        heard_by(listener, seconds=0.3)
    line = listener.lines[1]
    second.poll(1.0)
    assert second.lost and not line.lost
