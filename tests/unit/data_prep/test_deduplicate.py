"""Equal and alike documents go, across sources, and the first one stays; what is not alike never goes."""

import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_prep import deduplicate
from data_prep.deduplicate import Near, find_duplicates, jaccard, shingle_hashes
from data_prep.subset import open_dataset
from megalemur.data.indexed import IndexedFile
from megalemur.data.manifest import read_manifest
from tests.support.datasets import tokenizer_record, write_dataset

NEAR = Near(threshold=0.8, shingle=5, permutations=128, seed=0)


def documents(prefix: Path) -> list[list[int]]:
    file = IndexedFile(prefix)
    return [file.document(number).tolist() for number in range(file.num_documents)]


def command(*arguments):
    return CliRunner().invoke(deduplicate.app, list(map(str, arguments)))


def kept_of(folder: Path, sources, near: Near | None) -> list[list[bool]]:
    opened = [open_dataset(write_dataset(folder / f"s{k}", texts)) for k, texts in enumerate(sources)]
    found = find_duplicates(opened, near)
    return [found.kept[a:b].tolist() for a, b in pairwise(found.starts)]


def text(seed: int, length: int = 300) -> list[int]:
    return np.random.default_rng(seed).integers(3, 900, length).tolist()


def edited(document: list[int], share: float, seed: int = 0) -> list[int]:
    """With a share of its tokens changed here and there."""
    rng = np.random.default_rng(seed)
    return [int(rng.integers(1000, 9000)) if rng.random() < share else token for token in document]


def set_jaccard(one: list[int], other: list[int], n: int = 5) -> float:
    a, b = ({tuple(document[k : k + n]) for k in range(len(document) - n + 1)} for document in (one, other))
    return len(a & b) / len(a | b)


SOURCES = st.lists(st.lists(st.lists(st.integers(3, 4), min_size=1, max_size=3), min_size=1, max_size=12), min_size=1)


@settings(max_examples=60, deadline=None)
@given(SOURCES.filter(lambda sources: len(sources) < 4), st.integers(1, 9))
def test_exact_duplicates_are_those_of_a_plain_dictionary(sources, block):
    first, expected, pairs = {}, [], []
    for number, document in enumerate(tuple(document) for texts in sources for document in texts):
        expected.append(document not in first)
        if document in first:
            pairs.append((number, first[document], 1.0))
        first.setdefault(document, number)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(deduplicate, "_BLOCK", block)
        opened = [open_dataset(write_dataset(Path(folder) / f"s{k}", texts)) for k, texts in enumerate(sources)]
        found = find_duplicates(opened, None)
    assert found.kept.tolist() == expected
    assert sorted(pair for source in found.pairs for pair in source) == pairs
    assert found.exact == [expected[a:b].count(False) for a, b in pairwise(found.starts)]


def test_the_jaccard_is_that_of_python_sets():
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = (rng.integers(0, 3, rng.integers(5, 200)).tolist() for _ in range(2))
        found = jaccard(*(shingle_hashes(np.array(document, np.uint16), 5) for document in (one, other)))
        assert found == pytest.approx(set_jaccard(one, other))


def test_alike_documents_go_and_others_stay(tmp_path):
    originals = [text(seed) for seed in range(150)]
    alike = [edited(document, 0.01, seed) for seed, document in enumerate(originals)]
    changed = [edited(document, 0.1, seed) for seed, document in enumerate(originals)]
    similar = [set_jaccard(a, b) for a, b in zip(originals, alike, strict=True)]
    assert max(set_jaccard(a, b) for a, b in zip(originals, changed, strict=True)) < 0.8
    first, second, third = kept_of(tmp_path, [originals, alike, changed], NEAR)
    assert all(first) and all(third)
    gone = [similarity for similarity, kept in zip(similar, second, strict=True) if not kept]
    assert min(gone) >= 0.8
    assert len(gone) >= 0.95 * sum(similarity >= 0.8 for similarity in similar) > 100


def test_a_document_goes_only_for_one_that_stays(tmp_path):
    # the second goes for the first; the third is like the second alone, and must stay
    first = text(1, 1000)
    second = [*text(2, 60), *first[60:]]
    third = [*second[:-100], *text(3, 100)]
    assert set_jaccard(second, third) > 0.8 > set_jaccard(first, third)
    assert kept_of(tmp_path, [[first, second, third]], NEAR) == [[True, False, True]]


def test_short_documents_are_compared_exactly_alone(tmp_path):
    texts = [[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 9]]
    assert kept_of(tmp_path, [texts], NEAR) == [[True, True, False, True, True]]


def test_the_size_of_a_batch_changes_nothing(tmp_path, monkeypatch):
    texts = [[text(seed, 400), edited(text(seed, 400), 0.01)] for seed in range(20)]
    flat = [one for pair in texts for one in pair]
    whole = kept_of(tmp_path, [flat], NEAR)
    monkeypatch.setattr(deduplicate, "_BATCH_TOKENS", 64)  # every document comes alone, in several pieces
    monkeypatch.setattr(deduplicate, "_REMEMBERED", 1)
    assert kept_of(tmp_path, [flat], NEAR) == whole
    assert sum(whole[0]) < 30


def test_a_long_document_s_signature_does_not_depend_on_its_pieces(monkeypatch):
    shingles = [np.arange(1000, dtype=np.uint64) * 97]
    alike = deduplicate._Alike([], [0], NEAR)
    [whole] = alike._signatures(shingles)
    monkeypatch.setattr(deduplicate, "_BATCH_TOKENS", 64)
    [pieces] = alike._signatures(shingles)
    assert pieces.digest() == whole.digest() != alike._signatures([shingles[0][:64]])[0].digest()


@pytest.mark.parametrize("longer", [0, 1])
def test_a_longer_and_a_shorter_document_can_be_alike(tmp_path, longer):
    pair = [text(1), text(1)]
    pair[longer] += text(2, 40)
    assert kept_of(tmp_path, [pair], NEAR) == [[True, False]]


def test_of_two_alike_documents_the_first_is_named(tmp_path):
    middle = text(1, 1000)
    first, second = [*text(2, 60), *middle[60:]], [*middle[:-60], *text(3, 60)]
    assert set_jaccard(first, second) < 0.8 < min(set_jaccard(middle, first), set_jaccard(middle, second))
    for texts in ([first, second, middle], [second, first, middle]):
        source = open_dataset(write_dataset(tmp_path / "a", texts))
        [[pair]] = find_duplicates([source], NEAR).pairs
        assert pair == (2, 0, pytest.approx(set_jaccard(texts[0], middle)))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_find_a_pair_at_the_threshold(threshold):
    near = NEAR._replace(threshold=threshold)
    assert 128 % near.bands == 0 and near.chance(near.bands) >= 0.9
    assert near.bands == 1 or near.chance(near.bands // 2) < 0.9


def test_the_command_writes_each_source_under_its_name(tmp_path):
    a, b = [text(1), text(2), text(1)], [text(3), edited(text(2), 0.004), text(3), text(4)]
    write_dataset(tmp_path / "in" / "a", a)
    write_dataset(tmp_path / "in" / "b", b)
    assert set_jaccard(text(2), b[1]) > 0.9
    result = command(tmp_path / "in" / "a", tmp_path / "in" / "b", "--output-directory", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "2 of 3 documents kept; 1 exact and 0 near duplicates removed" in result.stdout
    assert "2 of 4 documents kept; 1 exact and 1 near duplicates removed" in result.stdout
    assert documents(tmp_path / "out" / "a") == a[:2]
    assert documents(tmp_path / "out" / "b") == [b[0], b[3]]
    origin = read_manifest(tmp_path / "out" / "b").origin
    assert origin.tool == "deduplicate" and origin.parents == (read_manifest(tmp_path / "in" / "b").digest,)
    assert (origin.arguments["threshold"], origin.arguments["shingle"], origin.arguments["seed"]) == (0.8, 5, 0)
    facts = origin.facts
    assert facts["exact_duplicates"] == {"a": 1, "b": 1} and facts["near_duplicates"] == {"a": 0, "b": 1}
    similarity = set_jaccard(text(2), b[1])
    assert facts["pairs"] == [
        "b:2 duplicates b:0, similarity 1.000",
        f"b:1 duplicates a:1, similarity {similarity:.3f}",
    ]
    assert facts["pairs_not_listed"] == 0


def test_the_order_of_the_sources_says_who_stays(tmp_path):
    write_dataset(tmp_path / "a", [text(1)])
    write_dataset(tmp_path / "b", [text(1), text(2)])
    command(tmp_path / "b", tmp_path / "a", "--output-directory", tmp_path / "out")
    assert documents(tmp_path / "out" / "b") == [text(1), text(2)]
    assert documents(tmp_path / "out" / "a") == []


def test_the_list_of_pairs_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(deduplicate, "_LISTED", 3)
    write_dataset(tmp_path / "a", [[5]] * 10)
    assert command(tmp_path / "a", "--output", tmp_path / "b").exit_code == 0
    facts = read_manifest(tmp_path / "b").origin.facts
    assert len(facts["pairs"]) == 3 and facts["pairs_not_listed"] == 6


def test_exact_only_leaves_near_duplicates(tmp_path):
    write_dataset(tmp_path / "a", [text(1), edited(text(1), 0.004), text(1)])
    assert command(tmp_path / "a", "--output", tmp_path / "b", "--exact-only").exit_code == 0
    assert documents(tmp_path / "b") == [text(1), edited(text(1), 0.004)]


def test_a_dry_run_writes_nothing(tmp_path):
    write_dataset(tmp_path / "a", [[5], [5]])
    before = sorted(tmp_path.iterdir())
    result = command(tmp_path / "a", "--dry-run")
    assert result.exit_code == 0 and "1 exact and 0 near duplicates would be removed" in result.stdout
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a", "x/a", "--output-directory", "o"], "two data sets have the name 'a'"),
        (["a", "b", "--output", "o"], "--output-directory"),
        (["a"], "--dry-run"),
        (["a", "--output", "o", "--output-directory", "o"], "--dry-run"),
        (["a", "--output", "b"], "--overwrite"),
        (["a", "--output", "a", "--overwrite"], "is an input"),
        (["a", "b", "--output-directory", "."], "is an input"),
        (["a", "--output", "o", "--near", "0"], "--near 0.0"),
        (["a", "--output", "o", "--near", "1.5"], "--near 1.5"),
        (["a", "other", "--output-directory", "o"], "another tokenizer"),
        (["a", "missing", "--output-directory", "o"], "missing"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "x/a"):
        write_dataset(Path(name), [[5], [5]])
    write_dataset(Path("other"), [[5]], tokenizer_record(b"another"))
    before = sorted(tmp_path.rglob("*"))
    result = command(*arguments)
    code = 12 if message == "another tokenizer" else 1
    assert result.exit_code == code and result.stderr.startswith("error: ") and message in result.stderr
    assert sorted(tmp_path.rglob("*")) == before and documents(Path("b")) == [[5], [5]]


def test_the_file_runs_by_path_and_never_imports_torch(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    write_dataset(tmp_path / "a", [[5], [5]])
    run = subprocess.run(
        [sys.executable, deduplicate.__file__, tmp_path / "a", "--output", tmp_path / "b"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join([str(tmp_path), *sys.path])},
    )
    assert run.returncode == 0, run.stderr
    assert documents(tmp_path / "b") == [[5]]
