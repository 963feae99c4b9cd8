"""Text to indexed data set, through the command: tokens, manifest, control strings, errors with file and line."""

import gzip
import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import xxhash
from typer.testing import CliRunner

from data_prep import build_index, plan
from megalemur.data.indexed import IndexedFile
from megalemur.data.manifest import read_manifest
from tests.support.datasets import MODEL

TEXTS = ["def f(x):\n    return x\n", "Lemurs live on Madagascar.", "héllo ✓ 你好\t\n", "", "one\x00two"]


@pytest.fixture(scope="module")
def reference():
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


def command(*arguments):
    return CliRunner().invoke(build_index.app, ["--tokenizer", str(MODEL), *map(str, arguments)])


def lines(path: Path, texts=TEXTS, key="text") -> Path:
    path.write_text("".join(json.dumps({key: text, "id": k}) + "\n" for k, text in enumerate(texts)))
    return path


def documents(prefix: Path) -> list[list[int]]:
    file = IndexedFile(prefix)
    starts = [*file.document_starts(0, file.num_tokens).tolist(), file.num_tokens]
    return [file.tokens(a, b).tolist() for a, b in pairwise(starts)]


def test_documents_are_sentencepiece_s_tokens_and_eos(tmp_path, reference):
    result = command("--input", lines(tmp_path / "a.jsonl"), "--output", tmp_path / "out" / "a")
    assert result.exit_code == 0, result.output
    assert documents(tmp_path / "out" / "a") == [[*reference.encode(text), 2] for text in TEXTS if text]


def test_the_manifest_says_what_made_the_files(tmp_path, reference):
    command("--input", lines(tmp_path / "a.jsonl"), "--output", tmp_path / "a", "--prepend-bos", "--no-append-eos")
    manifest, file = read_manifest(tmp_path / "a"), IndexedFile(tmp_path / "a")
    tokenizer = manifest.tokenizer
    assert tokenizer.sha256 == hashlib.sha256(MODEL.read_bytes()).hexdigest()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (
        *(32000, 1, 2, 0),
        None,
    )
    assert manifest.prepend_bos and not manifest.append_eos
    assert (manifest.documents, manifest.empty_documents, manifest.unknown_tokens) == (4, 1, 0)
    assert manifest.tokens == file.num_tokens and manifest.dtype == file.dtype.name == "uint16"
    [source] = manifest.inputs
    assert (source.name, source.documents, source.empty_documents) == (str(tmp_path / "a.jsonl"), 4, 1)
    assert source.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.vouches(tmp_path / "a") and manifest.digest == file.digest
    for ending in ("bin", "idx"):
        data, record = (tmp_path / f"a.{ending}").read_bytes(), manifest.files[ending]
        assert record.bytes == len(data) and record.xxh3_128 == xxhash.xxh3_128_hexdigest(data)
    assert documents(tmp_path / "a") == [[1, *reference.encode(text)] for text in TEXTS if text]


def test_control_strings_in_text_stay_text(tmp_path, reference):
    text = "<s>a</s> <unk> </s>\n<s>"
    command("--input", lines(tmp_path / "a.jsonl", [text]), "--output", tmp_path / "a")
    [tokens] = documents(tmp_path / "a")
    assert not {0, 1, 2} & set(tokens[:-1])
    assert reference.decode(tokens) == text
    assert read_manifest(tmp_path / "a").control_strings == {"<s>": 2, "</s>": 2, "<unk>": 1}


def test_the_number_of_workers_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_SMALLEST", 2000)
    texts = [f"document {k}: " + "lorem ipsum " * (k % 17) for k in range(300)]
    source = lines(tmp_path / "a.jsonl", texts)
    for workers in (1, 2, 3, 7):
        command("--input", source, "--output", tmp_path / str(workers) / "a", "--workers", workers)
    for ending in ("bin", "idx"):
        contents = {(tmp_path / str(workers) / f"a.{ending}").read_bytes() for workers in (1, 2, 3, 7)}
        assert len(contents) == 1
    assert IndexedFile(tmp_path / "7" / "a").num_documents == 300


def test_files_directories_globs_and_compression_are_read_in_a_fixed_order(tmp_path, reference):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.py").write_text("print(2)\n")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n\n{"text": "two"}', mtime=0))
    (folder / "deep" / "c.jsonl").write_text('{"text": "three"}\n')
    (folder / ".hidden").write_text("no")
    (tmp_path / "x1.txt").write_text("x1")
    (tmp_path / "x2.txt").write_text("x2")
    result = command("--input", tmp_path / "x*.txt", "--input", folder, "--output", tmp_path / "a", "--no-append-eos")
    assert result.exit_code == 0, result.output
    decoded = [reference.decode(tokens) for tokens in documents(tmp_path / "a")]
    assert decoded == ["x1", "x2", "one", "two", "print(2)\n", "three"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "ok"}\n\n{"body": "no"}\n', "a.jsonl:3: no text under 'text' (it has 'body')"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: 'text' is int, not text"),
        ("a.jsonl", b'{"text": null}\n', "a.jsonl:1: 'text' is null, not text"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1: no JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: not JSON in UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: not JSON in UTF-8"),
        ("a.txt", b"fine\nnot \xff fine", "a.txt:2: byte 0xff at offset 9 is not UTF-8"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be decompressed"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "ok"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz:100: cannot be decompressed"),
        ("a.jsonl.gz", gzip.compress(b"ok" * 99, mtime=0)[:-20] + b"\xff" * 20, "a.jsonl.gz: cannot be decompressed"),
    ],
)
def test_bad_input_is_named_with_its_line_and_leaves_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    result = command("--input", tmp_path / name, "--output", tmp_path / "out" / "a")
    assert result.exit_code == 21 and message in result.output
    assert [path.name for path in (tmp_path / "out").glob("*")] == ["a.work"]
    # and with one bad document allowed, the good ones are there and the bad one is listed
    result = command("--input", tmp_path / name, "--output", tmp_path / "out" / "a", "--skip-bad", 1)
    if result.exit_code == 0:
        [bad] = read_manifest(tmp_path / "out" / "a").bad
        assert message.startswith(f"{Path(bad.where).name}: {bad.reason}"[: len(message)])
        assert IndexedFile(tmp_path / "out" / "a").num_documents >= 1
    else:
        assert "no text" in result.output


def test_an_input_without_any_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    result = command("--input", tmp_path / "a.txt", "--output", tmp_path / "a")
    assert result.exit_code == 1 and "1 documents and no text" in result.output


def test_zstandard_files_of_several_frames_are_read_and_damaged_ones_refused(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="reading .zst needs the package zstandard")
    path = tmp_path / "a.jsonl.zst"
    line = b'{"text": "some text"}\n'
    frame = zstandard.compress(line * 50_000) + zstandard.compress(line)
    path.write_bytes(frame)
    assert command("--input", path, "--output", tmp_path / "a").exit_code == 0
    assert read_manifest(tmp_path / "a").documents == 50_001
    for damaged, where in ((frame[:-3], ":50001"), (b"no zstd", ""), (frame + b"x" * 20, ":50002")):
        path.write_bytes(damaged)
        result = command("--input", path, "--output", tmp_path / "b", "--restart")
        assert result.exit_code == 21 and f"a.jsonl.zst{where}: cannot be decompressed" in result.output


def test_wrong_arguments_are_refused(tmp_path):
    source = lines(tmp_path / "a.jsonl")
    for arguments, message in [
        (["--input", tmp_path / "none*"], "no such file"),
        (["--input", source, "--input", tmp_path], "named more than once"),
        (["--input", source, "--tokenizer", source], "neither a SentencePiece model nor"),
        (["--input", source, "--tokenizer", tmp_path / "none"], "neither a SentencePiece model nor"),
        (["--input", source, "--part", 2, "--parts", 2], "with a part of 0 to N-1"),
        (["--input", source, "--part", 0, "--parts", 2, "--shuffle", 1], "give it there"),
        (["--input", "-", "--format", "text"], "only JSON lines can be read from a pipe"),
        (["--input", "nowhere://x/*.jsonl"], "--input nowhere://x/*.jsonl"),
    ]:
        result = command(*arguments, "--output", tmp_path / "out")
        assert result.exit_code == 1 and message in result.output, (arguments, result.output)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_data_set_is_replaced_only_when_asked(tmp_path):
    first, second = lines(tmp_path / "a.jsonl"), lines(tmp_path / "b.jsonl", ["other"])
    command("--input", first, "--output", tmp_path / "out")
    before = (tmp_path / "out.bin").read_bytes()
    result = command("--input", second, "--output", tmp_path / "out")
    assert result.exit_code == 1 and "--overwrite" in result.output
    assert (tmp_path / "out.bin").read_bytes() == before
    assert command("--input", second, "--output", tmp_path / "out", "--overwrite").exit_code == 0
    assert read_manifest(tmp_path / "out").documents == 1


def test_the_file_runs_by_path_and_never_imports_torch(tmp_path):
    script = Path(build_index.__file__)
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    source, output = lines(tmp_path / "a.jsonl"), tmp_path / "o"
    run = subprocess.run(
        [sys.executable, script, "--input", source, "--tokenizer", MODEL, "--output", output],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert "fastokens" in run.stdout and IndexedFile(output).num_documents == 4
