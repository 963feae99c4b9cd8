"""The report of a data set: its numbers are right, a browser shows it, and nothing in a document is more than text."""

import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from data_prep import report
from data_prep.inspect_index import Bin
from data_prep.report import Repeats, count_tokens, find_repeats, write_report
from data_prep.tokenizer import load_tokenizer
from megalemur.data.errors import MissingDataError
from megalemur.data.indexed import IndexedFile
from megalemur.data.manifest import BadDocument, InputRecord, manifest_path
from tests.support.browser import dom
from tests.support.datasets import MODEL, tokenizer_record, write_dataset

ROOT = Path(__file__).parents[3]
ATTACK = """</div></pre><script>document.title = "owned"</script><img src=x onerror="document.title='owned'">"""
TEXTS = [
    ATTACK,
    "def f(x):\n    return x\n",
    "Lemurs 🦊 leap.",
    "again\n",
    "again\n",
    "again\n",
    '"quoted" & <b>bold</b>',
]


class Page(HTMLParser):
    """The cells of every section's tables, the text of every section, and the tags."""

    def __init__(self, text: str):
        super().__init__()
        self.section, self.tags, self.attributes, self.titles = "", Counter(), set(), []
        self.text: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag == "section":
            self.section = dict(attrs)["id"]
        elif tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        elif tag in ("td", "th"):
            self.rows[self.section][-1].append("")
            self._cell = True
        elif tag == "span":
            self.titles.append(dict(attrs)["title"])

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text[self.section] = self.text.get(self.section, "") + data
        if self._cell:
            self.rows[self.section][-1][-1] += data

    def fact(self, section: str, name: str) -> str:
        [row] = [row for row in self.rows[section] if row[0] == name]
        return row[1]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def encoded(tokenizer, texts) -> list[list[int]]:
    ids = tokenizer.encode(texts)
    return [[*ids.text(k).tolist(), 2] for k in range(len(texts))]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, tokenizer):
    record = {"bytes": 1, "mtime_ns": 1, "empty_documents": 0, "bad": 1, "documents": 2}
    inputs = tuple(
        InputRecord(name=f"<i>{k}.jsonl", tokens=1000 - k, text_bytes=3 * (1000 - k), **record) for k in range(53)
    )
    bad = tuple(BadDocument(where=f"{k}.jsonl:1", reason=ATTACK) for k in range(103))
    where = tmp_path_factory.mktemp("report") / "set <1>"
    return write_dataset(where, encoded(tokenizer, TEXTS), tokenizer.record, inputs=inputs, bad=bad)


@pytest.fixture(scope="module")
def written(prefix, tokenizer):
    path = prefix.with_name("deep") / "report.html"
    write_report(prefix, path, tokenizer)
    return path


@pytest.fixture(scope="module")
def browsed(written, tmp_path_factory):
    """What Chromium makes of the page, and what it has to say about it."""
    text, log = dom(written, tmp_path_factory.mktemp("chromium"))
    return Page(text), log


def test_a_browser_shows_the_numbers(browsed, prefix):
    page, _ = browsed
    file = IndexedFile(prefix)
    assert page.fact("summary", "documents") == "7" and page.fact("summary", "tokens") == f"{file.num_tokens:,}"
    assert page.fact("documents-by-length", "longest") == f"{len(file.document(0)):,}"
    times = Counter(file.tokens(0, file.num_tokens).tolist())
    frequent = [row for row in page.rows["tokens"] if len(row) == 4 and row[0] != "piece"]
    assert [(int(row[1]), int(row[2])) for row in frequent] == sorted(times.items(), key=lambda x: (-x[1], x[0]))[:50]
    assert page.fact("tokens", "</s> (id 2)") == "7"
    newlines_and_a_fox = sum(text.count("\n") for text in TEXTS) + 4
    assert page.fact("tokens", "byte fallback").startswith(f"{newlines_and_a_fox} of {file.num_tokens} tokens")
    assert "2 of 7 documents (28.57%) repeat an earlier one" in page.text["exact-duplicates"]
    assert page.rows["exact-duplicates"][1] == ["3", "3", f"{len(file.document(3))}", "again\n"]


def test_a_document_s_script_is_text_and_nothing_runs(browsed):
    page, log = browsed
    assert page.tags["script"] == page.tags["img"] == page.tags["b"] == page.tags["i"] == 0
    assert page.text["sample-documents"].count(ATTACK) == 1  # once as text; the pieces hold ▁ for a space
    assert page.text["bad-documents"].count(ATTACK) == 100
    assert "owned" not in page.text[""].split("set <1>")[1]
    assert "CONSOLE" not in log


def test_tables_end_where_they_would_grow_endless(browsed):
    page, _ = browsed
    assert len(page.rows["bytes-a-token"]) == 1 + 50 + 1
    assert page.rows["bytes-a-token"][-1][:4] == ["3 others together", "6", "2,847", "3.00"]
    assert "103 were left out; here are the first 100." in page.text["bad-documents"]
    assert len(page.rows["bad-documents"]) == 1 + 100


def test_samples_are_spread_and_every_token_says_what_it_is(written, prefix, tokenizer):
    page, file = Page(written.read_text()), IndexedFile(prefix)
    samples = [0, 1, 2, 3, 4, 6]
    assert re.findall(r"Document (\d+):", page.text["sample-documents"]) == [str(number) for number in samples]
    ids = [int(token) for number in samples for token in file.document(number)]
    assert page.titles == [f"id {token}: {tokenizer.piece(token)}" for token in ids]


def test_the_page_stands_alone(written):
    text = written.read_text()
    assert len(text) < 300_000
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "base"} & set(page.tags)
    assert not [name for name in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert not re.search(r"@import|url\(", text.split("</style>")[0])
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert [path.name for path in written.parent.iterdir()] == ["report.html"]


def test_bars_are_as_tall_as_what_they_count():
    chart = report.bars([Bin(512, 1023, 10), Bin(1024, 2047, 12_345), Bin(2048, 4095, 0)])
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', chart)]
    assert heights[1] > 0 and heights[0] == pytest.approx(heights[1] * 10 / 12_345, abs=0.06) and heights[2] == 0
    assert re.findall(r">([^<>]+)</text>", chart)[:-1] == ["10", "512", "12k", "1K", "0", "2K"]
    assert "1,024 to 2,047 tokens: 12,345 documents" in chart


def test_a_page_on_long_documents_stays_small(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    write_dataset(tmp_path / "a", [rng.integers(3, 32000, 5000) for _ in range(20)], tokenizer.record)
    write_report(tmp_path / "a", tmp_path / "a.html", tokenizer)
    page = Page((tmp_path / "a.html").read_text())
    assert len(page.titles) == 6 * 300 and (tmp_path / "a.html").stat().st_size < 300_000


@pytest.mark.parametrize("vocab_size", [32000, 70000], ids=["uint16", "int32"])
def test_tokens_are_counted_in_blocks(tmp_path, monkeypatch, vocab_size):
    monkeypatch.setattr(report, "_BLOCK", 100)
    tokens = np.random.default_rng(0).integers(0, 32000, 1234)
    file = IndexedFile(write_dataset(tmp_path / "a", [tokens], tokenizer_record(vocab_size=vocab_size)))
    assert (count_tokens(file, 70000) == np.bincount(tokens, minlength=70000)).all()


def test_duplicates_are_those_of_a_counter(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_DOCUMENTS", 13)
    rng = np.random.default_rng(0)
    documents = [[int(value), 7] for value in rng.integers(3, 90, 200)] + [[9]]
    repeats = find_repeats(IndexedFile(write_dataset(tmp_path / "a", documents)))
    times = Counter(map(tuple, documents))
    assert (repeats.documents, repeats.copies, repeats.halvings) == (201, 201 - len(times), 0)
    most = [(count, documents.index(list(document))) for document, count in times.items() if count > 1]
    assert repeats.most(1000) == sorted(most, key=lambda one: (-one[0], one[1]))


def test_a_sample_of_duplicates_holds_all_copies_or_none():
    rng = np.random.default_rng(0)
    distinct = rng.integers(0, 1 << 64, (20_000, 2), dtype=np.uint64)
    digests = rng.permutation(np.repeat(distinct, 3, axis=0))
    repeats = Repeats(limit=1000)
    for first in range(0, len(digests), 777):
        repeats.add(digests[first : first + 777], first)
    assert repeats.halvings >= 5 and repeats.documents <= 3000
    assert repeats.copies * 3 == repeats.documents * 2
    assert {times for times, _ in repeats.most(10_000)} == {3}
    expected = 60_000 / 2**repeats.halvings
    assert 0.8 * expected < repeats.documents < 1.2 * expected


def test_digests_that_share_their_first_half_are_told_apart():
    repeats = Repeats(limit=10)
    repeats.add(np.array([[1, 1], [1, 2], [2, 1], [1, 2]], np.uint64), 0)
    assert repeats.copies == 1 and repeats.most(10) == [(2, 1)]


def test_a_sample_is_said_to_be_one(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(report, "_DIGESTS", 20)
    write_dataset(tmp_path / "a", [[k, 2] for k in range(3, 203)], tokenizer.record)
    write_report(tmp_path / "a", tmp_path / "a.html", tokenizer)
    assert re.search("random sample, one in (16|32) of the distinct documents", (tmp_path / "a.html").read_text())


def test_little_is_enough(tmp_path, tokenizer):
    write_dataset(tmp_path / "empty", [])
    write_report(tmp_path / "empty", tmp_path / "a.html", tokenizer)
    page = Page((tmp_path / "a.html").read_text())
    assert page.fact("summary", "documents") == "0" and "There is no document." in page.text["sample-documents"]
    assert "pieces and text may be wrong" in (tmp_path / "a.html").read_text()  # by the digest of its tokenizer
    manifest_path(write_dataset(tmp_path / "bare", [[5, 2]])).unlink()
    write_report(tmp_path / "bare", tmp_path / "a.html", tokenizer)
    assert "There is no manifest" in Page((tmp_path / "a.html").read_text()).text["summary"]


def test_nothing_is_replaced_by_a_report_that_fails(tmp_path, tokenizer):
    write_dataset(tmp_path / "a", [[40000, 2]], tokenizer_record(vocab_size=50000))
    (tmp_path / "r.html").write_text("before")
    with pytest.raises(ValueError, match="holds id 40000, but --tokenizer knows 0 to 31999"):
        write_report(tmp_path / "a", tmp_path / "r.html", tokenizer)
    with pytest.raises(MissingDataError):
        write_report(tmp_path / "b", tmp_path / "r.html", tokenizer)
    assert (tmp_path / "r.html").read_text() == "before"


def test_the_command_writes_it_and_says_what_is_wrong(prefix, tmp_path):
    def command(*arguments):
        return CliRunner().invoke(report.app, list(map(str, arguments)))

    result = command(prefix, "--tokenizer", MODEL, "--output", tmp_path / "a.html")
    assert result.exit_code == 0 and result.stdout.startswith(f"{tmp_path / 'a.html'}: ")
    for arguments, code, message in (
        ((prefix, "--tokenizer", MODEL, "--output", f"{prefix}.bin"), 1, "give a file that ends in .html"),
        ((prefix, "--tokenizer", "nowhere", "--output", tmp_path / "b.html"), 1, "--tokenizer nowhere"),
        ((tmp_path / "no", "--tokenizer", MODEL, "--output", tmp_path / "b.html"), 12, "no.idx: no such file"),
    ):
        result = command(*arguments)
        assert result.exit_code == code and result.stderr.startswith("error: ") and message in result.stderr


def test_it_runs_by_path_and_without_torch(prefix, tmp_path):
    code = (
        "import runpy, sys; sys.argv[0] = 'report.py'\n"
        "try: runpy.run_path('data_prep/report.py', run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    arguments = [str(prefix), "--tokenizer", str(MODEL), "--output", str(tmp_path / "a.html")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "a.html").exists(), done.stderr
