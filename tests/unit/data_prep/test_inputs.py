"""Inputs of every form give the same data set; what is named must be there."""

import bz2
import gzip
import lzma
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from data_prep import build_index, feed, plan
from data_prep.inputs import Source, find_inputs
from data_prep.plan import Unit, make_units, part_of
from megalemur.data.indexed import IndexedFile
from megalemur.data.manifest import read_manifest
from tests.support.datasets import MODEL

TEXTS = [f"text {k} " + "lemur\n" * (k % 40) for k in range(400)]


def lines(texts=TEXTS) -> bytes:
    return b"".join(orjson.dumps({"text": text, "n": k}) + b"\n" for k, text in enumerate(texts))


def build(source, output: Path, *arguments, code=0):
    options = ["--input", source, "--tokenizer", MODEL, "--output", output, "--workers", 2, *arguments]
    result = CliRunner().invoke(build_index.app, [str(option) for option in options])
    assert result.exit_code == code, result.output
    return result.output


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The data set that all forms must equal."""
    directory = tmp_path_factory.mktemp("plain")
    (directory / "a.jsonl").write_bytes(lines())
    build(directory / "a.jsonl", directory / "a")
    return contents(directory / "a")


@pytest.fixture
def small_units(monkeypatch):
    """Files of a few kilobytes are cut as large ones are."""
    for module, name, value in ((plan, "_SMALLEST", 3000), (plan, "STREAM_BYTES", 100), (feed, "CHUNK_BYTES", 2000)):
        monkeypatch.setattr(module, name, value)


def zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.compress(data[:5000]) + zstandard.compress(data[5000:])


@pytest.mark.parametrize(
    ("name", "pack"),
    [("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress), ("zst", zstd)],
)
@pytest.mark.parametrize("cut", ["whole", "chunks"])
def test_compressed_files(tmp_path, plain, name, pack, cut, request):
    if cut == "chunks":
        request.getfixturevalue("small_units")
    (tmp_path / f"a.jsonl.{name}").write_bytes(pack(lines()))
    build(tmp_path / f"a.jsonl.{name}", tmp_path / "a")
    assert contents(tmp_path / "a") == plain


def test_ranges_of_one_file(tmp_path, plain, small_units):
    (tmp_path / "a.ndjson").write_bytes(b"\xef\xbb\xbf" + lines().replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    assert len(make_units(find_inputs([str(tmp_path / "a.ndjson")]))) > 10
    build(tmp_path / "a.ndjson", tmp_path / "a")
    assert contents(tmp_path / "a") == plain


@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize("cut", ["whole", "row groups"])
def test_parquet(tmp_path, plain, rows, cut, request):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    if cut == "row groups":
        request.getfixturevalue("small_units")
    table = arrow.table({"n": list(range(len(TEXTS))), "text": TEXTS})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=rows)
    build(tmp_path / "a.parquet", tmp_path / "a")
    assert contents(tmp_path / "a") == plain


@pytest.mark.parametrize("form", ["file", "stream"])
def test_arrow(tmp_path, plain, form):
    import pyarrow as arrow

    table = arrow.table({"text": TEXTS})
    new = arrow.ipc.new_file if form == "file" else arrow.ipc.new_stream
    with new(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=37)
    build(tmp_path / "a.arrow", tmp_path / "a")
    assert contents(tmp_path / "a") == plain


def test_a_column_that_is_not_there_and_a_row_without_text(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    assert "no column 'text' (it has 'body')" in build(tmp_path / "a.parquet", tmp_path / "a", code=21)
    parquet.write_table(arrow.table({"text": ["x", None, "y"]}), tmp_path / "b.parquet")
    assert "b.parquet:2: 'text' is null" in build(tmp_path / "b.parquet", tmp_path / "b", code=21)


def test_urls(tmp_path, plain):
    (tmp_path / "in").mkdir()
    data = lines()
    middle = data.index(b"\n", len(data) // 2) + 1
    (tmp_path / "in" / "1.jsonl").write_bytes(data[:middle])
    (tmp_path / "in" / "2.jsonl.gz").write_bytes(gzip.compress(data[middle:]))
    build(f"file://{tmp_path}/in/*.jsonl*", tmp_path / "a")
    assert contents(tmp_path / "a") == plain
    build(f"file://{tmp_path}/in", tmp_path / "b")
    assert contents(tmp_path / "b") == plain


@pytest.mark.parametrize("pipe", ["stdin", "fifo"])
def test_pipes(tmp_path, plain, pipe):
    script = [sys.executable, build_index.__file__, "--tokenizer", MODEL, "--output", tmp_path / "a", "--input"]
    if pipe == "stdin":
        ended = subprocess.run([*script, "-"], input=lines(), capture_output=True, timeout=60, check=False)
    else:
        os.mkfifo(tmp_path / "in.jsonl")
        process = subprocess.Popen([*script, tmp_path / "in.jsonl"])
        (tmp_path / "in.jsonl").write_bytes(lines())
        process.wait(60)
        ended = process
    assert ended.returncode == 0
    assert contents(tmp_path / "a") == plain


def test_an_unreadable_file_is_one_bad_document(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").symlink_to(tmp_path / "b.txt2")
    (tmp_path / "b.txt2").write_text("gone soon")
    inputs = find_inputs([str(tmp_path / "*.txt")])
    (tmp_path / "b.txt2").unlink()
    from data_prep.documents import read_unit

    batches = list(read_unit(make_units(inputs)[0], inputs, "text"))
    assert [text for batch in batches for text in batch.texts] == ["fine"]
    [bad] = [bad for batch in batches for bad in batch.bad]
    assert "cannot be read: No such file" in bad.reason


def test_line_numbers_are_those_of_the_whole_file(tmp_path, small_units):
    spoiled = lines().splitlines(keepends=True)
    spoiled[11], spoiled[333] = b"{}\n", b"[\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(spoiled))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(spoiled)))
    for name, output in (("a.jsonl", "a"), ("b.jsonl.gz", "b")):
        said = build(tmp_path / name, tmp_path / output, "--skip-bad", 1, code=21)
        assert f"{name}:334: not JSON" in said, "the first that is too many, in the order of the file"
        build(tmp_path / name, tmp_path / output, "--skip-bad", 2)
        manifest = read_manifest(tmp_path / output)
        assert [bad.where for bad in manifest.bad] == [f"{tmp_path / name}:12", f"{tmp_path / name}:334"]
        assert manifest.documents == len(TEXTS) - 2 and manifest.inputs[0].bad == 2


def test_line_numbers_of_a_part_are_those_of_the_whole_file(tmp_path, small_units):
    spoiled = lines().splitlines(keepends=True)
    spoiled[390] = b"{}\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(spoiled))
    said = build(tmp_path / "a.jsonl", tmp_path / "a", "--part", 3, "--parts", 4, code=21)
    assert "a.jsonl:391: no text" in said


def test_a_damaged_file_gives_what_stands_before_the_damage(tmp_path, small_units):
    packed = gzip.compress(lines(), mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    said = build(tmp_path / "a.jsonl.gz", tmp_path / "a", code=21)
    assert "cannot be decompressed from here on" in said
    build(tmp_path / "a.jsonl.gz", tmp_path / "a", "--skip-bad", 1)
    manifest = read_manifest(tmp_path / "a")
    assert 50 < manifest.documents < len(TEXTS)
    assert contents(tmp_path / "a")[0] != b""


def test_the_plan_depends_on_the_input_alone_and_parts_cover_it_once():
    sources = [Source(f"{k}.jsonl", "jsonl", None, size, "1") for k, size in enumerate([10, 70 << 20, 0, 33 << 20, 5])]
    units = make_units(sources)
    assert make_units(sources) == units
    assert sum(unit.weight for unit in units) == sum(source.size or 0 for source in sources)
    ranges = [unit for unit in units if unit.kind == "range" and unit.first == 1]
    assert [unit.start for unit in ranges[1:]] == [unit.stop for unit in ranges[:-1]]
    for parts in (1, 2, 3, 50):
        numbers = [number for part in range(parts) for number in part_of(units, part, parts)]
        assert numbers == list(range(len(units)))


def test_small_files_share_a_unit_and_large_compressed_ones_are_streams():
    small = [Source(f"{k}.py", "text", None, 100, "1") for k in range(1000)]
    assert make_units(small) == [Unit("files", 0, 999, 0, 0, 100_000)]
    large = [Source(f"{k}.jsonl.zst", "jsonl", "zstd", 1 << 30, "1") for k in range(3)]
    assert [unit.kind for unit in make_units(large)] == ["stream"] * 3
    many = [Source(f"{k}.jsonl.zst", "jsonl", "zstd", 1 << 30, "1") for k in range(300)]
    assert {unit.kind for unit in make_units(many)} == {"files"}, "enough files for all workers: each reads its own"


def test_parts_merge_to_the_whole(tmp_path, plain, small_units):
    from data_prep import merge_index

    (tmp_path / "a.jsonl").write_bytes(lines())
    for part in range(3):
        build(tmp_path / "a.jsonl", tmp_path / "a", "--part", part, "--parts", 3)
    parts = [str(path.with_suffix("")) for path in sorted(tmp_path.glob("a.part-*.bin"), reverse=True)]
    merged = CliRunner().invoke(merge_index.app, [*parts, "--output", str(tmp_path / "a")])
    assert merged.exit_code == 0, merged.output
    assert contents(tmp_path / "a") == plain
    manifest = read_manifest(tmp_path / "a")
    [source] = manifest.inputs
    assert source.documents == len(TEXTS) and manifest.part is None
    for wrong, said in ((parts[:2], "parts 0 of 3 are missing"), ([*parts, parts[0]], "given more than once")):
        refused = CliRunner().invoke(merge_index.app, [*wrong, "--output", str(tmp_path / "x")])
        assert refused.exit_code == 1 and said in refused.output


def test_a_seed_orders_the_documents_and_loses_none(tmp_path, plain):
    (tmp_path / "a.jsonl").write_bytes(lines())
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        build(tmp_path / "a.jsonl", tmp_path / name, "--shuffle", seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "again") != contents(tmp_path / "two")
    documents = []
    for name in ("one", "two"):
        file = IndexedFile(tmp_path / name)
        documents.append(sorted(file.document(k).tobytes() for k in range(file.num_documents)))
    assert documents[0] == documents[1] and b"".join(documents[0]) != plain[0]
