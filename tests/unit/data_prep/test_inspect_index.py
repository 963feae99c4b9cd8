"""What a data set holds, through the command: facts, lengths, documents as tokens, searches, and errors that help."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from data_prep import inspect_index
from data_prep.inspect_index import Lengths, Viewer, document_numbers, find, visible
from data_prep.tokenizer import load_tokenizer
from megalemur.data.indexed import IndexedFile, bin_path
from megalemur.data.manifest import BadDocument, InputRecord, manifest_path
from tests.support.datasets import MODEL, tokenizer_record, write_dataset

ROOT = Path(__file__).parents[3]
TEXTS = ["Lemurs live on Madagascar.", "def f(x):\n\treturn x\n", "red \x1b[31m alert", "Lemurs leap. " * 50]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture
def prefix(tmp_path, tokenizer):
    documents = [[*ids, 2] for ids in encoded(tokenizer, TEXTS)]
    return write_dataset(tmp_path / "set", documents, tokenizer.record)


def encoded(tokenizer, texts) -> list[list[int]]:
    ids = tokenizer.encode(texts)
    return [ids.text(k).tolist() for k in range(len(texts))]


def command(*arguments):
    return CliRunner().invoke(inspect_index.app, list(map(str, arguments)))


def shown(*arguments) -> str:
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fact(output: str, name: str) -> str:
    """The value beside a name, in one of the tables."""
    [line] = [line for line in output.splitlines() if line.strip("│ ").startswith(f"{name} ")]
    return line.split("│")[2].strip()


def test_it_says_what_the_files_and_the_manifest_say(prefix):
    output, file = shown(prefix), IndexedFile(prefix)
    assert fact(output, "dtype") == "uint16"
    assert fact(output, "documents") == fact(output, "sequences") == "4"
    assert fact(output, "tokens") == f"{file.num_tokens:,}"
    assert fact(output, "BOS") == "not added (id 1)" and fact(output, "EOS") == "ends every document, id 2"
    assert fact(output, "bytes a token") == "4.00"
    assert fact(output, "vouches") == "yes"
    assert fact(output, "longest") == f"{len(file.document(3)):,}"


def test_it_sums_up_what_was_left_out(tmp_path):
    record = {"bytes": 1, "mtime_ns": 1, "documents": 1, "empty_documents": 3, "tokens": 2, "text_bytes": 5}
    write_dataset(
        tmp_path / "a",
        [[5, 2]],
        inputs=tuple(InputRecord(name=f"{k}", bad=k, **record) for k in range(3)),
        bad=(BadDocument(where="1:1", reason="not JSON"),),
        control_strings={"<s>": 1, "</s>": 1200},
        part=(2, 8),
    )
    output = shown(tmp_path / "a")
    assert fact(output, "inputs") == "3, with 9 empty documents left out"
    assert fact(output, "bad documents") == "3 left out"
    assert fact(output, "control strings") == "</s> 1,200, <s> 1"
    assert fact(output, "bytes a token") == "2.50"
    assert fact(output, "part") == "2, of 0 to 7"


def test_files_that_changed_are_not_vouched_for(prefix):
    bin_path(prefix).touch()
    assert fact(shown(prefix), "vouches").startswith("no")


def test_files_without_a_manifest_are_shown(prefix):
    manifest_path(prefix).unlink()
    output = shown(prefix)
    assert "no manifest" in output and fact(output, "documents") == "4"


def test_lengths_are_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_index, "_BLOCK", 7)
    monkeypatch.setattr(inspect_index, "_COUNTED", 1 << 5)
    rng = np.random.default_rng(0)
    wanted = np.sort(rng.integers(1, 300, 200))
    write_dataset(tmp_path / "a", [[3] * int(length) for length in rng.permutation(wanted)])
    lengths = Lengths(IndexedFile(tmp_path / "a"))
    for fraction in (0, 0.01, 0.25, 0.5, 0.99, 1):
        assert lengths.quantile(fraction) == np.quantile(wanted, fraction, method="inverted_cdf")
    bins = lengths.bins()
    assert sum(one.documents for one in bins) == 200
    for one in bins:
        assert one.documents == ((wanted >= one.shortest) & (wanted <= one.longest)).sum()
    assert bins[-1].shortest == 256 and bins[-1].longest == 511


def test_a_data_set_without_documents_has_no_lengths(tmp_path):
    write_dataset(tmp_path / "a", [])
    output = shown(tmp_path / "a")
    assert fact(output, "documents") == "0" and fact(output, "longest") == "0"


def test_documents_are_shown_as_pieces_and_text(prefix, tokenizer):
    output = shown(prefix, "--tokenizer", MODEL, "--documents", "0-1").splitlines()
    pieces = [tokenizer.piece(token) for token in IndexedFile(prefix).document(0)]
    assert output[:4] == [f"document 0: {len(pieces)} tokens", "|".join(pieces), "text:", TEXTS[0]]
    assert "def f(x):" in output and any(line.startswith("document 1:") for line in output)


def test_ids_stand_beside_the_pieces(prefix, tokenizer):
    ids = IndexedFile(prefix).document(0).tolist()
    with_ids = "|".join(f"{tokenizer.piece(token)}:{token}" for token in ids)
    assert with_ids in shown(prefix, "--tokenizer", MODEL, "--documents", "0", "--ids")
    assert " ".join(map(str, ids)) in shown(prefix, "--documents", "0")


def test_a_long_document_is_cut(prefix):
    output = shown(prefix, "--tokenizer", MODEL, "--documents", "3", "--max-tokens", "3").splitlines()
    assert output[0].endswith("tokens, shown are 0 to 2") and output[1].count("|") == 2


def test_a_terminal_gets_colours_and_no_control_characters(prefix, tokenizer):
    console = Console(force_terminal=True, color_system="standard", no_color=False, record=True, width=200)
    Viewer(console, IndexedFile(prefix), tokenizer, max_tokens=50, ids=False).show(2)
    output = console.export_text(styles=True)
    assert "\x1b[30;106m" in output and "\x1b[30;103m" in output
    assert "\\u001b[31m alert" in output and "\x1b[31m alert" not in output


def test_text_that_would_turn_the_line_around_is_written_out():
    assert visible("a\u202eb\x00\r\n\tc\x9b") == "a\\u202eb\\u0000\\u000d\n\tc\\u009b"


def test_a_search_stops_at_its_limit(prefix):
    found = shown(prefix, "--tokenizer", MODEL, "--search", "Lemurs l")
    assert "document 0:" in found and "document 3:" in found and "2 documents with 'Lemurs l'\n" in found
    first = shown(prefix, "--tokenizer", MODEL, "--search", "Lemurs l", "--limit", "1")
    assert "document 3:" not in first and "raise --limit 1" in first
    within = shown(prefix, "--tokenizer", MODEL, "--search", "Lemurs", "--documents", "1-3")
    assert "document 0:" not in within and "document 3:" in within
    assert "0 documents with 'lynx'" in shown(prefix, "--tokenizer", MODEL, "--search", "lynx")


def test_a_match_is_found_wherever_it_stands_and_is_what_is_shown(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(inspect_index, "_WINDOW", 64)
    for words in range(0, 150, 7):
        ids = tokenizer.encode(["word " * words + "a lynx 🦊 sleeps" + " word" * 40]).ids
        at = find(ids, "lynx 🦊", tokenizer)
        assert "lynx 🦊" in tokenizer.decode(ids[: at + 1].tolist())
        assert "lynx 🦊" not in tokenizer.decode(ids[:at].tolist())
        assert find(ids, "lynx  🦊", tokenizer) is None
    write_dataset(tmp_path / "a", [ids.tolist()], tokenizer.record)
    output = shown(tmp_path / "a", "--tokenizer", MODEL, "--search", "lynx", "--max-tokens", "12")
    assert "lynx" in output.split("text:")[1].splitlines()[1]


@pytest.mark.parametrize(
    ("text", "numbers"), [("3", [3]), ("3,10-12", [3, 10, 11, 12]), (" 0 - 1 , 0", [0, 1, 0]), ("12-12", [12])]
)
def test_documents_are_named_by_numbers_and_ranges(text, numbers):
    assert [number for named in document_numbers(text, 13) for number in named] == numbers


BAD = [
    (("--documents", "4"), "--documents 4: no document 4; there are 4, from 0 to 3"),
    (("--documents", "0,4"), "--documents 0,4: no document 4"),
    (("--documents", "3-1"), "write 1-3"),
    (("--documents", "-1"), "write numbers and ranges, as 3,10-12"),
    (("--documents", ""), "is not a number"),
    (("--search", "a"), "add --tokenizer"),
    (("--search", "", "--tokenizer", MODEL), "--search: an empty text"),
    (("--documents", "0", "--tokenizer", "nowhere.model"), "--tokenizer nowhere.model"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_cannot_be_shown_is_said_in_one_line(prefix, arguments, message):
    result = command(prefix, *arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    result = command(tmp_path / "a")
    assert result.exit_code == 12 and f"error: {tmp_path / 'a'}.idx: no such file" in result.stderr


def test_another_tokenizer_is_warned_of_and_unknown_ids_are_refused(tmp_path):
    write_dataset(tmp_path / "a", [[5, 2]])
    result = command(tmp_path / "a", "--tokenizer", MODEL, "--documents", "0")
    assert result.exit_code == 0 and result.stderr.startswith("warning: --tokenizer has sha256")
    write_dataset(tmp_path / "b", [[5, 2], [40000, 2]], tokenizer_record(vocab_size=50000))
    for arguments in (("--documents", "1"), ("--search", "a")):
        result = command(tmp_path / "b", "--tokenizer", MODEL, *arguments)
        assert result.exit_code == 1
        assert "document 1: holds id 40000, but --tokenizer knows 0 to 31999" in result.stderr


def test_a_byte_level_tokenizer_shows_its_pieces_and_the_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model = tokenizers.Tokenizer(tokenizers.models.BPE({piece: k for k, piece in enumerate(sorted(alphabet))}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    write_dataset(tmp_path / "a", encoded(tokenizer, ["x\n y🦊"]), tokenizer.record)
    output = shown(tmp_path / "a", "--tokenizer", tmp_path / "tokenizer.json", "--search", "🦊")
    assert "x|Ċ|Ġ|y|ð|Ł|¦|Ĭ\n" in output and "text:\nx\n y🦊\n" in output


def test_it_runs_by_path_and_without_torch(prefix):
    code = (
        "import runpy, sys; sys.argv = ['x', sys.argv[1]]\n"
        "try: runpy.run_path('data_prep/inspect_index.py', run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(prefix)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Documents by length" in done.stdout
