"""Memory for the copy of a background save: what the ranks of one machine want together, and the refusal."""

from types import SimpleNamespace

import psutil
import pytest

from megalemur.checkpoint.errors import CheckpointError
from megalemur.checkpoint.host_memory import Need, available_bytes, refuse_scarce
from megalemur.checkpoint.saver import Saver
from megalemur.config.checkpoint import CheckpointConfig
from tests.unit.checkpoint.synthetic import contents, whole_pieces

GIB = 1 << 30


def test_a_machine_that_has_enough_for_all_its_ranks_is_no_problem() -> None:
    refuse_scarce([Need("a", 3 * GIB, 8 * GIB), Need("a", 4 * GIB, 9 * GIB), Need("b", 5 * GIB, 5 * GIB)])


def test_a_machine_with_too_little_is_named_with_the_sizes_and_the_setting() -> None:
    with pytest.raises(CheckpointError) as caught:
        refuse_scarce([Need("a", GIB, 8 * GIB), Need("b", 3 * GIB, 8 * GIB), Need("b", 6 * GIB, 8 * GIB)])
    said = str(caught.value)
    assert "9.00 GiB for the 2 ranks of b (6.00 GiB the largest)" in said and "8.00 GiB of memory left" in said
    assert "checkpoint.asynchronous=false" in said and " a " not in said


def test_what_is_left_is_known_and_no_more_than_the_machine_has() -> None:
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_a_state_that_does_not_fit_is_refused_before_anything_is_allocated(tmp_path, monkeypatch) -> None:
    # a machine with little memory cannot be had here: its figure is the only thing made up
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    saver = Saver(CheckpointConfig(directory=tmp_path), None)
    with pytest.raises(CheckpointError, match=r"has 0\.00 GiB of memory left"):
        saver.prepare(contents(whole_pieces()))
    plain = Saver(CheckpointConfig(directory=tmp_path, asynchronous=False), None)
    plain.prepare(contents(whole_pieces()))
    plain.save(contents(whole_pieces()))
    plain.raise_last()
