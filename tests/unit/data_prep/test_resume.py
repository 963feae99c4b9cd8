"""An interrupted build goes on; another input or other settings are refused; nothing half-made is taken for whole."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep import build_index, plan
from data_prep.encode import Encoder, Shard
from data_prep.errors import EngineError
from megalemur.data.manifest import read_manifest
from tests.faults.builds import interrupt, prepare
from tests.support.datasets import MODEL
from tests.unit.data_prep.test_inputs import build, contents, lines, small_units  # noqa: F401 - a fixture


def test_twenty_kills_change_no_byte(tmp_path):
    chance, kills, number = random.Random(os.getpid()), 0, 0
    shared = prepare(tmp_path)
    while kills < 20:
        number += 1
        (tmp_path / f"{number}").mkdir()
        hits = interrupt(shared, tmp_path / f"{number}", chance)
        kills += len(hits) - hits.count("it was done")


@pytest.fixture
def begun(tmp_path, small_units):  # noqa: F811
    """A build that a bad line ended, with most of its units finished."""
    spoiled = lines().splitlines(keepends=True)
    spoiled[395] = b"{}\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(spoiled))
    build(tmp_path / "a.jsonl", tmp_path / "a", code=21)
    return tmp_path


def test_finished_units_are_not_done_twice(begun):
    journal = begun / "a.work" / "journal.jsonl"
    done = journal.read_bytes()
    assert done.count(b"\n") > 5
    said = build(begun / "a.jsonl", begun / "a", "--skip-bad", 1)
    assert f"going on with {done.count(b'}' + chr(10).encode())}" in said or "going on with" in said
    assert not (begun / "a.work").exists() and read_manifest(begun / "a").documents == 399


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "a.jsonl").write_bytes(lines()), "a.jsonl: size"),
        (lambda d: os.utime(d / "a.jsonl", ns=(1, 1)), "a.jsonl: version"),
    ],
)
def test_a_changed_input_is_refused_by_name(begun, change, said):
    change(begun)
    output = build(begun / "a.jsonl", begun / "a", code=22)
    assert said in output.replace("\n", " ") and "--restart" in output
    build(begun / "a.jsonl", begun / "a", "--restart", "--skip-bad", 1)


def test_other_files_and_settings_are_refused(begun):
    (begun / "b.jsonl").write_bytes(lines())
    assert "b.jsonl is new among the input" in build(begun / "*.jsonl", begun / "a", code=22)
    output = build(begun / "a.jsonl", begun / "a", "--prepend-bos", "--text-key", "n", code=22)
    assert "text key was text and is n" in output and "prepend BOS was False and is True" in output
    assert "never changes" in build(begun / "a.jsonl", begun / "a", "--engine", "reference", code=22)


def test_damaged_shards_and_a_torn_journal_are_done_again(begun):
    whole = begun / "whole"
    shutil.copytree(begun / "a.work", begun / "whole.work")
    build(begun / "a.jsonl", whole, "--skip-bad", 1)
    [*shards] = sorted((begun / "a.work").glob("shard-*.bin"), key=lambda path: path.stat().st_size)
    data = bytearray(shards[-1].read_bytes())
    data[len(data) // 3] ^= 1
    shards[-1].write_bytes(data)
    journal = begun / "a.work" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    build(begun / "a.jsonl", begun / "a", "--skip-bad", 1)
    assert contents(begun / "a") == contents(whole)


def test_a_shard_that_is_damaged_before_it_is_joined_ends_the_build(begun, monkeypatch):
    from data_prep.join import Joiner

    def damage(joiner, extent):
        path = joiner.work.path / extent.shard
        data = bytearray(path.read_bytes())
        data[extent.start] ^= 1
        path.write_bytes(data)
        return add(joiner, extent)

    add = Joiner.add
    monkeypatch.setattr(Joiner, "add", damage)
    assert "was damaged since it was written" in build(begun / "a.jsonl", begun / "a", "--skip-bad", 1, code=25)
    assert not (begun / "a.idx").exists()
    monkeypatch.undo()
    monkeypatch.setattr(plan, "_SMALLEST", 3000)
    build(begun / "a.jsonl", begun / "a", "--skip-bad", 1)


def test_a_second_build_of_the_same_output_waits_for_nobody(begun):
    from data_prep.work import Work

    held = Work(begun / "a", 2)
    assert "another process builds this data set" in build(begun / "a.jsonl", begun / "a", code=25)
    held.close()


def test_a_file_that_changes_while_it_is_read_is_not_joined(tmp_path, monkeypatch):
    from data_prep import build as build_module

    (tmp_path / "a.jsonl").write_bytes(lines())
    encode_all = build_module.encode_all

    def append_meanwhile(*arguments):
        with (tmp_path / "a.jsonl").open("ab") as stream:
            stream.write(b'{"text": "late"}\n')
        return encode_all(*arguments)

    monkeypatch.setattr(build_module, "encode_all", append_meanwhile)
    assert "changed while it was read" in build(tmp_path / "a.jsonl", tmp_path / "a", code=22)
    assert not (tmp_path / "a.idx").exists()


def test_a_full_disk_is_said_and_the_next_run_goes_on(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines() * 20)
    script = [sys.executable, build_index.__file__, "--input", tmp_path / "a.jsonl", "--tokenizer", MODEL]
    options = [*map(str, script), "--output", str(tmp_path / "a"), "--workers", "1"]

    def small_files():  # no file may grow beyond this: what a full disk says comes from the same call
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    full = subprocess.run(options, capture_output=True, text=True, preexec_fn=small_files, timeout=60, check=False)
    assert full.returncode == 24, full.stderr
    assert os.strerror(errno.EFBIG) in full.stderr and "make room" in full.stderr and "Traceback" not in full.stderr
    assert not (tmp_path / "a.idx").exists()
    again = subprocess.run(options, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0, again.stderr


def test_a_worker_that_is_killed_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines() * 300)
    script = [sys.executable, build_index.__file__, "--input", tmp_path / "a.jsonl", "--tokenizer", MODEL]
    process = subprocess.Popen(
        [*map(str, script), "--output", str(tmp_path / "a"), "--workers", "1", "--engine", "reference"],
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        assert process.poll() is None
    os.kill(int(found[0]), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 25 and "killed by signal 9" in said


class OtherIds:
    """An engine that is right on the probes and the sample, and wrong later."""

    name = "wrong 1.0"

    def __init__(self, reference):
        self._reference = reference

    def encode(self, texts):
        encoded = self._reference.encode(texts)
        encoded.ids[-1:] += any("lemur" in text for text in texts)
        return encoded


def test_an_engine_that_goes_wrong_during_the_build_is_caught(tmp_path):
    from data_prep.documents import Batch
    from data_prep.encode import Settings
    from data_prep.inputs import find_inputs
    from data_prep.tokenizer import load_tokenizer

    (tmp_path / "a.jsonl").write_bytes(lines())
    reference = load_tokenizer(MODEL)
    encoder = Encoder(Settings(MODEL, "fast", "text", False, True), OtherIds(reference), reference)
    batch = Batch(0, texts=["fine"] * 1020 + ["fine", "a lemur"], lines=list(range(1, 1023)))
    with pytest.raises(EngineError, match=r"a\.jsonl, document 1021 of this unit \(its line 1022\)"):
        Shard(tmp_path / "shard").write([batch], encoder, find_inputs([str(tmp_path / "a.jsonl")]))


def test_a_fast_engine_that_differs_is_not_taken(tmp_path):
    from data_prep.engine import choose_engine
    from data_prep.tokenizer import load_tokenizer

    reference = load_tokenizer(MODEL)
    assert choose_engine(OtherIds(reference), reference, "auto", [["no"]])[0] == "fast"
    chosen, reason = choose_engine(OtherIds(reference), reference, "auto", [["no"], ["lemurs"]])
    assert chosen == "reference" and "'lemurs'" in reason
    with pytest.raises(ValueError, match="--engine fast"):
        choose_engine(OtherIds(reference), reference, "fast", [["lemurs"]])


def test_the_reference_engine_gives_the_same_data_set(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    build(tmp_path / "a.jsonl", tmp_path / "fast", "--engine", "fast")
    build(tmp_path / "a.jsonl", tmp_path / "reference", "--engine", "reference")
    assert contents(tmp_path / "fast") == contents(tmp_path / "reference")
    assert CliRunner().invoke(build_index.app, ["--help"]).exit_code == 0


class Slow(OtherIds):
    """Right, and slower than the reference."""

    def encode(self, texts):
        for _ in range(20):
            encoded = self._reference.encode(texts)
        return encoded


def test_a_fast_engine_that_is_slow_on_this_input_is_not_taken_unless_asked_for():
    from data_prep.engine import choose_engine
    from data_prep.tokenizer import load_tokenizer

    reference = load_tokenizer(MODEL)
    texts = [[f"number {k} of many " * 20 for k in range(200)]]
    chosen, reason = choose_engine(Slow(reference), reference, "auto", texts)
    assert chosen == "reference" and "wrong 1.0 is slower" in reason
    assert choose_engine(Slow(reference), reference, "fast", texts)[0] == "fast"
