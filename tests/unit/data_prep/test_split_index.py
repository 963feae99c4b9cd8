"""The split is a property of each document: it stays where it is, and both sides together are the whole."""

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_prep import split_index
from megalemur.data.indexed import IndexedFile
from megalemur.data.manifest import read_manifest
from tests.support.datasets import tokenizer_record, write_dataset


def documents(prefix: Path) -> list[tuple[int, ...]]:
    file = IndexedFile(prefix)
    return [tuple(file.document(number).tolist()) for number in range(file.num_documents)]


def command(source: Path, *arguments):
    folder = source.parent
    return CliRunner().invoke(
        split_index.app,
        [str(source), "--train", str(folder / "train"), "--validation", str(folder / "valid"), *map(str, arguments)],
    )


def split(folder: Path, texts, *arguments) -> tuple[list, list]:
    result = command(write_dataset(folder / "a", texts), "--overwrite", *arguments)
    assert result.exit_code == 0, result.output
    return documents(folder / "train"), documents(folder / "valid")


def texts_of(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 900, rng.integers(3, 9)).tolist() for _ in range(count)]


def test_both_sides_are_the_whole_in_its_order(tmp_path):
    texts = [tuple(text) for text in texts_of(400)]
    train, valid = split(tmp_path, texts, "--validation-share", 0.1)
    assert train == [text for text in texts if text not in set(valid)]
    assert valid == [text for text in texts if text not in set(train)]
    assert Counter(train) + Counter(valid) == Counter(texts)
    assert 20 <= len(valid) <= 62  # 40 expected, 6 is one standard deviation


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(0, 60))
def test_no_document_changes_sides_when_others_come_or_go_or_move(seed, added):
    texts = [tuple(text) for text in texts_of(60)]
    other = texts[: len(texts) - added // 3] + [tuple(text) for text in texts_of(added, seed=1)] + texts[:5]
    Random(seed).shuffle(other)
    with tempfile.TemporaryDirectory() as folder:
        train, valid = map(set, split(Path(folder), texts, "--validation-share", 0.5))
        new_train, new_valid = map(set, split(Path(folder), other, "--validation-share", 0.5))
    assert not train & new_valid and not valid & new_train
    assert not new_train & new_valid  # equal documents are on one side


def test_the_width_of_a_token_does_not_matter(tmp_path):
    narrow = split(tmp_path, texts_of(200), "--validation-share", 0.3)
    wide = tokenizer_record(b"w", vocab_size=100_000)
    write_dataset(tmp_path / "a", texts_of(200), wide)
    assert IndexedFile(tmp_path / "a").dtype.itemsize == 4
    assert command(tmp_path / "a", "--overwrite", "--validation-share", 0.3).exit_code == 0
    assert (documents(tmp_path / "train"), documents(tmp_path / "valid")) == narrow


def test_a_larger_share_takes_in_the_smaller_one_and_a_seed_moves_it(tmp_path):
    texts = texts_of(300)
    small = set(split(tmp_path, texts, "--validation-share", 0.1)[1])
    large = set(split(tmp_path, texts, "--validation-share", 0.4)[1])
    moved = set(split(tmp_path, texts, "--validation-share", 0.1, "--seed", 7)[1])
    assert small < large and moved != small


def test_the_split_of_today_is_the_split_of_tomorrow(tmp_path):
    _, valid = split(tmp_path, [[number] for number in range(3, 60)], "--validation-share", 0.1)
    assert [one[0] for one in valid] == [10, 32, 45, 51]


def test_the_manifests_say_what_was_asked(tmp_path):
    train, valid = split(tmp_path, texts_of(100), "--validation-share", 0.25, "--seed", 3)
    parent = read_manifest(tmp_path / "a")
    for name, side, size in (("train", "train", len(train)), ("valid", "validation", len(valid))):
        manifest = read_manifest(tmp_path / name)
        assert manifest.documents == size and manifest.origin.parents == (parent.digest,)
        assert manifest.origin.tool == "split_index" and manifest.origin.facts["side"] == side
        assert manifest.origin.facts["validation_documents"] == len(valid)
        asked = manifest.origin.arguments
        assert (asked["validation_share"], asked["seed"]) == (0.25, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--validation-share", 0], "--validation-share 0.0: write a share above 0"),
        (["--validation-share", 1], "--validation-share 1.0"),
        (["--validation-share", "nan"], "--validation-share nan"),
        (["--validation-share", 1e-9], "--validation: would be empty"),
        (["--validation-share", 1 - 1e-9], "--train: would be empty"),
        (["--seed", 1 << 64], "--seed"),
        (["--vocab-size", 9], "--vocab-size 9"),
    ],
)
def test_what_cannot_be_split_is_refused_and_nothing_is_written(tmp_path, arguments, message):
    result = command(write_dataset(tmp_path / "a", texts_of(30)), *arguments)
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and message in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx", "a.manifest.json"}


def test_an_output_is_replaced_only_when_asked(tmp_path):
    write_dataset(tmp_path / "a", texts_of(30))
    write_dataset(tmp_path / "valid", [[5]])
    result = command(tmp_path / "a", "--validation-share", 0.5)
    assert result.exit_code == 1 and "--validation" in result.stderr and "--overwrite" in result.stderr
    assert documents(tmp_path / "valid") == [(5,)] and not (tmp_path / "train.idx").exists()
    assert command(tmp_path / "a", "--validation-share", 0.5, "--overwrite").exit_code == 0


def test_one_prefix_cannot_be_both_sides_or_the_source(tmp_path):
    prefix = str(write_dataset(tmp_path / "a", texts_of(30)))
    for train, valid in (("x", "x"), ("a", "x"), ("x", "a")):
        arguments = [prefix, "--train", str(tmp_path / train), "--validation", str(tmp_path / valid), "--overwrite"]
        result = CliRunner().invoke(split_index.app, arguments)
        assert result.exit_code == 1 and "choose another prefix" in result.stderr


def test_the_file_runs_by_path_and_never_imports_torch(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    write_dataset(tmp_path / "a", texts_of(30))
    arguments = [tmp_path / "a", "--train", tmp_path / "t", "--validation", tmp_path / "v", "--validation-share", "0.5"]
    path = ":".join([str(tmp_path), *sys.path])
    run = subprocess.run(
        [sys.executable, split_index.__file__, *arguments],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr
    assert "documents" in run.stdout and (tmp_path / "v.idx").exists()
