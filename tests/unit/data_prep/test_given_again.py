"""Every command may be killed at any moment and given again; each says by its exit code what was wrong."""

import errno
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from data_prep import decontaminate, deduplicate, merge_index, plan, split_index, verify, work
from data_prep.errors import WorkError
from data_prep.join import Joiner
from data_prep.verify_index import app as verify_app
from data_prep.work import Work
from megalemur.data.indexed import IndexedFile
from megalemur.data.manifest import manifest_path, read_manifest
from tests.support.datasets import MODEL, write_dataset
from tests.unit.data_prep.test_inputs import TEXTS, build, contents, lines, small_units  # noqa: F401 - a fixture
from tests.unit.data_prep.test_resume import begun  # noqa: F401 - a fixture

QUICK = ("--engine", "reference")


def run(app, *arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output.replace("\n", " ")


def test_a_finished_build_given_again_is_finished(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    build(tmp_path / "a.jsonl", tmp_path / "a", *QUICK)
    before = (tmp_path / "a.bin").stat().st_ino
    said = build(tmp_path / "a.jsonl", tmp_path / "a", *QUICK, "--report", tmp_path / "a.html")
    assert "this command built it before" in said.replace("\n", " ") and (tmp_path / "a.html").exists()
    assert (tmp_path / "a.bin").stat().st_ino == before
    (tmp_path / "a.jsonl").write_bytes(lines()[:-1])
    assert "add --overwrite" in build(tmp_path / "a.jsonl", tmp_path / "a", *QUICK, code=1).replace("\n", " ")


def test_a_build_that_was_to_replace_another_is_not_taken_for_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    build(tmp_path / "a.jsonl", tmp_path / "a", *QUICK)
    (tmp_path / "a.jsonl").write_bytes(lines()[:-1])
    (tmp_path / "a.work").mkdir()  # killed before it had a plan
    build(tmp_path / "a.jsonl", tmp_path / "a", *QUICK, code=1)
    build(tmp_path / "a.jsonl", tmp_path / "a", *QUICK, "--overwrite")


def test_parts_without_units_are_empty_and_merge(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    build(tmp_path / "a.jsonl", tmp_path / "whole", *QUICK)
    for part in range(3):  # of one unit
        build(tmp_path / "a.jsonl", tmp_path / "a", *QUICK, "--part", part, "--parts", 3)
    parts = sorted(tmp_path.glob("a.part-*.idx"))
    assert sorted(IndexedFile(path.with_suffix("")).num_documents for path in parts)[:2] == [0, 0]
    run(verify_app, *parts)
    run(merge_index.app, *parts, "--output", tmp_path / "a")
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")
    empty = [path for path in parts if not IndexedFile(path.with_suffix("")).num_documents]
    for path in empty:
        manifest = read_manifest(path.with_suffix(""))
        manifest_path(path.with_suffix("")).write_bytes(manifest.model_copy(update={"part": None}).dump())
    assert "would be empty" in run(merge_index.app, *empty, "--output", tmp_path / "b", code=1)


@pytest.mark.parametrize("torn", [b"", b"\0" * 99])
def test_a_plan_that_a_power_cut_tore_is_begun_anew(begun, torn):  # noqa: F811
    (begun / "a.work" / "plan.json").write_bytes(torn)
    build(begun / "a.jsonl", begun / "a", "--skip-bad", 1)


def test_units_cut_otherwise_are_not_mixed(begun, monkeypatch):  # noqa: F811
    """As by a later version: the journal's numbers would mean other documents."""
    monkeypatch.setattr(plan, "_SMALLEST", 7000)
    said = build(begun / "a.jsonl", begun / "a", "--skip-bad", 1, code=22)
    assert "are cut otherwise" in said.replace("\n", " ")


def test_a_lock_on_a_removed_directory_is_no_lock(tmp_path, monkeypatch):
    first = Work(tmp_path / "a", 2)
    flock, calls = work.fcntl.flock, []

    def removed_meanwhile(lock, how):
        calls.append(how)
        if len(calls) == 1:  # the first ends between our opening and our locking
            first.remove()
        return flock(lock, how)

    monkeypatch.setattr(work.fcntl, "flock", removed_meanwhile)
    second = Work(tmp_path / "a", 2)
    assert len(calls) == 2 and second.path.exists()
    monkeypatch.undo()
    with pytest.raises(WorkError, match="another process"):
        Work(tmp_path / "a", 2)
    second.close()


def test_a_file_system_without_locks_is_not_called_another_process(tmp_path, monkeypatch):
    def refuse(lock, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(work.fcntl, "flock", refuse)
    with pytest.raises(WorkError, match="cannot be locked"):
        Work(tmp_path / "a", 2)


DOCUMENTS = [[k + 3, 7, 2] for k in range(200)]


def killed_after(monkeypatch, module, commits):
    """End a command after it has committed some of its outputs."""
    commit = module.commit_subset

    def counted(*arguments, **named):
        nonlocal commits
        if commits == 0:
            raise KeyboardInterrupt
        commits -= 1
        return commit(*arguments, **named)

    monkeypatch.setattr(module, "commit_subset", counted)


@pytest.mark.parametrize("what", ["split", "deduplicate"])
def test_a_command_killed_between_its_outputs_goes_on(tmp_path, monkeypatch, what):
    for name in "ab":
        write_dataset(tmp_path / name, DOCUMENTS if name == "a" else [*DOCUMENTS[::-1][:150], [9, 9, 2]])
    if what == "split":
        module, options = split_index, ["--train", tmp_path / "t", "--validation", tmp_path / "v"]
        arguments = [tmp_path / "a", *options, "--validation-share", 0.1]
    else:
        module, arguments = deduplicate, [tmp_path / "a", tmp_path / "b", "--output-directory", tmp_path / "out"]
    with monkeypatch.context() as patch:
        killed_after(patch, module, 1)
        assert CliRunner().invoke(module.app, list(map(str, arguments))).exit_code != 0
    first = tmp_path / "t" if what == "split" else tmp_path / "out" / "a"
    assert read_manifest(first) is not None
    before = contents(first)
    run(module.app, *arguments)
    assert contents(first) == before
    assert run(module.app, *(0.2 if one == 0.1 else one for one in arguments), "--seed", 5, code=1).count("is there")
    write_dataset(tmp_path / "a", DOCUMENTS[:-1])
    assert run(module.app, *arguments, code=1).count("is there"), "of other parents: not the same"


def test_merge_and_decontaminate_given_again(tmp_path):
    for name in "ab":
        write_dataset(tmp_path / name, DOCUMENTS)
    for seed in ((), ("--shuffle", 3)):
        for _ in range(2):
            run(merge_index.app, tmp_path / "a", tmp_path / "b", "--output", tmp_path / f"c{len(seed)}", *seed)
    assert run(merge_index.app, tmp_path / "a", "--output", tmp_path / "c0", code=1).count("is there")
    (tmp_path / "in.jsonl").write_bytes(lines(TEXTS[:50]))
    build(tmp_path / "in.jsonl", tmp_path / "d", *QUICK)
    (tmp_path / "bench.jsonl").write_bytes(orjson.dumps({"q": "one two three four five six seven eight nine"}))
    options = ["--tokenizer", MODEL, "--benchmark", tmp_path / "bench.jsonl", "--output", tmp_path / "e"]
    for _ in range(2):
        run(decontaminate.app, tmp_path / "d", *options)


def test_two_shuffled_merges_to_one_place_do_not_mix(tmp_path, monkeypatch):
    a = write_dataset(tmp_path / "a", DOCUMENTS)
    b = write_dataset(tmp_path / "b", [[5, 2]] * 9)
    copy = merge_index.copy_shuffled

    def while_another_merges(*arguments):
        code = f"from data_prep.merge_index import merge; from pathlib import Path; d = Path({str(tmp_path)!r})\n"
        code += "merge([d / 'b'], d / 'c', shuffle=1, vocab_size=None)"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        copy(*arguments)

    monkeypatch.setattr(merge_index, "copy_shuffled", while_another_merges)
    run(merge_index.app, a, "--output", tmp_path / "c", "--shuffle", 1)
    file = IndexedFile(tmp_path / "c")
    assert file.num_documents == 200 and b.name == "b"
    assert sorted(file.document(k).tolist() for k in range(200)) == DOCUMENTS


def damaged_copy(prefix: Path) -> None:
    """A byte between those that a digest of the data samples, and another time."""
    path = Path(f"{prefix}.bin")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damage_is_not_copied_under_a_new_digest(tmp_path, monkeypatch):
    from megalemur.data import indexed

    monkeypatch.setattr(indexed, "_SAMPLED_BYTES", 2)
    monkeypatch.setattr(indexed, "_SAMPLES", 2)
    write_dataset(tmp_path / "a", DOCUMENTS)
    damaged_copy(tmp_path / "a")
    options = ["--train", tmp_path / "t", "--validation", tmp_path / "v", "--validation-share", 0.1]
    assert "are not what was written" in run(split_index.app, tmp_path / "a", *options, code=12)
    assert not (tmp_path / "t.idx").exists()


@contextmanager
def files_end_at(size: int):
    """No file may grow beyond this: what a full disk says comes from the same call."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_when_shards_are_joined(begun, monkeypatch):  # noqa: F811
    add = Joiner.add
    with files_end_at(resource.RLIM_INFINITY):

        def fill(joiner, extent):
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            add(joiner, extent)

        monkeypatch.setattr(Joiner, "add", fill)
        said = build(begun / "a.jsonl", begun / "a", "--skip-bad", 1, code=24)
    assert "make room and run the same command again: finished units stay" in said.replace("\n", " ")
    assert sorted(path.name for path in begun.iterdir()) == ["a.jsonl", "a.work"]
    monkeypatch.setattr(Joiner, "add", add)
    assert "going on with" in build(begun / "a.jsonl", begun / "a", "--skip-bad", 1)


def test_a_disk_that_is_full_when_a_data_set_is_split_or_merged(tmp_path):
    write_dataset(tmp_path / "a", DOCUMENTS)
    outputs = ["--train", tmp_path / "t", "--validation", tmp_path / "v", "--validation-share", 0.1]
    for app, arguments in ((split_index.app, outputs), (merge_index.app, ["--output", tmp_path / "c"])):
        with files_end_at(600):
            said = run(app, tmp_path / "a", *arguments, code=24)
        assert "make room and run the same command again" in said
    assert len(list(tmp_path.iterdir())) == 3


def test_a_manifest_without_a_digest_for_each_chunk_is_damaged(tmp_path):
    prefix = write_dataset(tmp_path / "a", DOCUMENTS)
    path = manifest_path(prefix)
    values = orjson.loads(path.read_bytes())
    values["files"]["bin"]["chunks"] = []
    path.write_bytes(orjson.dumps(values))
    assert "0 digests of chunks" in run(verify_app, prefix, code=12)


def test_what_changes_while_it_is_verified_is_not_vouched_for(tmp_path):
    prefix = write_dataset(tmp_path / "a", DOCUMENTS)
    verified = verify.verify(prefix)
    damaged_copy(prefix)
    os.utime(f"{prefix}.bin", ns=(1, 1))
    assert not verify.refreshed(verified).vouches(prefix)


def test_many_damaged_chunks_are_listed_in_linear_time():
    assert list(verify._runs([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 6), (7, 9)]
    assert list(verify._runs(list(range(0, 400_000, 2))))[-1] == (399_998, 399_999)
