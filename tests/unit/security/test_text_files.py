"""Run files, config.json, tokenizers, data sets that somebody else made: refused with a typed error."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.tokenizer import load_tokenizer as load_reference
from megalemur.config.load import ConfigError, load_run
from megalemur.data.errors import DataError
from megalemur.data.indexed import IndexedFile
from megalemur.data.manifest import read_manifest
from megalemur.data.sources import check_tokenizers
from megalemur.data.writer import IndexedWriter
from megalemur.generate.tokenizer import load_tokenizer, stop_ids
from megalemur.model.hf_config import read_hf_config
from tests.support.malice import SPECIAL, nested, patience, pickle_of, replace_by, sparse, torch_file_of
from tests.unit.config.run_files import RUN

LAUGHS = "a: &a [lol, lol]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)

YAML = {
    "billion laughs": lambda _: LAUGHS.encode(),
    "an alias to itself": lambda _: b"run: &a [*a]",
    "call": lambda canary: b"run: !!python/object/apply:os.system ['touch %s']" % str(canary).encode(),
    "new object": lambda canary: b"run: !!python/object/new:os.system ['touch %s']" % str(canary).encode(),
    "module": lambda _: b"run: !!python/module:os",
    "name": lambda _: b"run: !!python/name:os.system",
    "tuple": lambda _: b"run: !!python/tuple [1, 2]",
    "own tag": lambda _: b"run: !run {steps: 1}",
    "tag by its long name": lambda canary: (
        b"run: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch %s']" % str(canary).encode()
    ),
    "tag by a directive": lambda canary: (
        b"%%TAG ! tag:yaml.org,2002:python/object/apply:\n---\nrun: !os.system ['touch %s']" % str(canary).encode()
    ),
    "merge": lambda _: b"run: {<<: {steps: 1}}",
    "nested deeply": lambda _: nested(),
    "mappings nested deeply": lambda _: b"{a: " * 10_000,
    "indented deeply": lambda _: b"".join(b" " * i + b"a:\n" for i in range(1000)),
    "5,000 digits": lambda _: b"run: {steps: " + b"9" * 5000 + b"}",
    "a number that is none": lambda _: b"run: {steps: !!int nine}",
    "a day that is none": lambda _: b"run: {steps: !!timestamp 2024-99-99}",
    "bytes that are none": lambda _: b"run: {steps: !!binary '*'}",
    "infinity": lambda _: (RUN + "optim: {learning_rate: .inf}\n").encode(),
    "no number": lambda _: (RUN + "optim: {learning_rate: .nan}\n").encode(),
    "1e999": lambda _: (RUN + "optim: {learning_rate: 1e999}\n").encode(),
    "a key twice": lambda _: b"run: {steps: 1, steps: 2}",
    "two documents": lambda _: RUN.encode() + b"---\n" + RUN.encode(),
    "pickle": lambda canary: pickle_of(canary),
    "torch file": lambda canary: torch_file_of(canary),
    "empty": lambda _: b"",
    "not UTF-8": lambda _: b"run: \xff",
    "NUL": lambda _: b"run: \0",
    "half a letter": lambda _: b'run: {name: "\\ud800", steps: 1}',
    "two megabytes": lambda _: b"#" * (2 << 20),
}


@pytest.mark.parametrize("what", YAML)
def test_a_run_file_is_refused(what: str, tmp_path: Path) -> None:
    path, canary = tmp_path / "run.yaml", tmp_path / "canary"
    path.write_bytes(YAML[what](canary))
    with patience(), pytest.raises(ConfigError):
        load_run(path)
    assert not canary.exists()


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch {}']", "[&a 1, *a]", "!!int x", "[" * 5000])
def test_an_override_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    canary = tmp_path / "canary"
    with patience(), pytest.raises(ConfigError):
        load_run(tmp_path / "run.yaml", [f"run.steps={text.format(canary)}"])
    assert not canary.exists()


@pytest.mark.parametrize("what", SPECIAL)
def test_no_plain_file_is_read(what: str, tmp_path: Path) -> None:
    """One after the other: every kind of small file, in the place where its reader looks for it."""
    readers = {
        "run.yaml": (lambda: load_run(tmp_path / "run.yaml"), ConfigError),
        "config.json": (lambda: read_hf_config(tmp_path), ValueError),
        "x.idx": (lambda: IndexedFile(tmp_path / "x"), DataError),
        "tokenizer.json": (lambda: load_tokenizer(tmp_path), Exception),
    }
    if not what.startswith("link"):  # a link to nothing is a data set without a manifest
        readers["x.manifest.json"] = (lambda: read_manifest(tmp_path / "x"), DataError)
    if what in ("pipe", "endless device"):
        readers["t.model"] = (lambda: check_tokenizers([], tmp_path / "t.model"), ValueError)
    for name, (read, error) in readers.items():
        replace_by(tmp_path / name, what)
        with patience(), pytest.raises(error) as caught:
            read()
        assert not isinstance(caught.value, AssertionError)


CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
JSON = {
    "pickle": lambda canary: pickle_of(canary),
    "empty": lambda _: b"",
    "a list": lambda _: b"[]",
    "nested deeply": lambda _: nested(),
    "NaN": lambda _: b'{"model_type": "llama", "rope_theta": NaN}',
    "1e999": lambda _: b'{"model_type": "llama", "rope_theta": 1e999}',
    "a key twice": lambda _: b'{"model_type": "llama", "model_type": "llama"}',
    "not UTF-8": lambda _: b'{"model_type": "\xff"}',
    "half a letter": lambda _: rb'{"model_type": "llama", "x": "\ud800"}',
    "10**30 layers": lambda _: json.dumps({**CONFIG, "num_hidden_layers": 10**30}).encode(),
    "5,000 digits": lambda _: b'{"model_type": "llama", "num_hidden_layers": ' + b"9" * 5000 + b"}",
    "layers of text": lambda _: json.dumps({**CONFIG, "num_hidden_layers": "os.system"}).encode(),
    "layers of a list": lambda _: json.dumps({**CONFIG, "num_hidden_layers": [2]}).encode(),
    "negative layers": lambda _: json.dumps({**CONFIG, "num_hidden_layers": -2}).encode(),
    "no heads": lambda _: json.dumps({**CONFIG, "num_attention_heads": 0}).encode(),
    "rotary settings of a list": lambda _: json.dumps({**CONFIG, "rope_scaling": [1]}).encode(),
    "another architecture": lambda _: json.dumps({**CONFIG, "architectures": ["../../evil.Model"]}).encode(),
}


@pytest.mark.parametrize("what", JSON)
def test_a_config_is_refused(what: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "config.json").write_bytes(JSON[what](canary))
    with patience(), pytest.raises(ValueError):
        read_hf_config(tmp_path)
    assert not canary.exists()


def test_the_same_reader_takes_a_good_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert read_hf_config(tmp_path).model.num_layers == 2


TOKENIZERS = {
    "pickle": lambda canary: pickle_of(canary),
    "torch file": lambda canary: torch_file_of(canary),
    "empty": lambda _: b"",
    "noise": lambda _: bytes(range(256)) * 100,
    "nested deeply": lambda _: nested(),
    "a list": lambda _: b"[]",
    "no model": lambda _: b'{"version": "1.0"}',
    "unknown model": lambda _: b'{"version": "1.0", "model": {"type": "os.system"}}',
    "length without end": lambda _: b"\x0a" + b"\xff" * 9 + b"\x01",
}


@pytest.mark.parametrize("what", TOKENIZERS)
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_tokenizer_is_refused(what: str, name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(TOKENIZERS[what](canary))
    for load in (load_tokenizer, load_reference):
        with patience(), pytest.raises(ValueError):
            load(tmp_path)
    assert not canary.exists()


class NoTokenizer:
    eos = None


@pytest.mark.parametrize("what", ["pickle", "a list", "nested deeply", "NaN", "a key twice", "not UTF-8"])
def test_a_generation_config_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(JSON[what](tmp_path / "canary"))
    with patience(), pytest.raises(ValueError):
        stop_ids(tmp_path, NoTokenizer())
    assert not (tmp_path / "canary").exists()


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    with IndexedWriter(tmp_path / "x", vocab_size=100) as writer:
        writer.add(np.arange(50))
        writer.commit()
    return tmp_path / "x"


INDEXES = {
    "pickle": lambda canary: pickle_of(canary),
    "torch file": lambda canary: torch_file_of(canary),
    "empty": lambda _: b"",
    "numpy with a pickle": lambda canary: b"\x93NUMPY\x01\x00" + pickle_of(canary),
    "2**64 - 1 sequences": lambda _: b"MMIDIDX\0\0" + b"\1" + bytes(7) + b"\4" + b"\xff" * 16,
    "unknown dtype": lambda _: b"MMIDIDX\0\0" + b"\1" + bytes(7) + b"\xff" + bytes(16),
    "no end": lambda _: b"MMIDIDX\0\0",
}


@pytest.mark.parametrize("what", INDEXES)
def test_an_index_is_refused(what: str, data_set: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    Path(f"{data_set}.idx").write_bytes(INDEXES[what](canary))
    with patience(), pytest.raises(DataError):
        IndexedFile(data_set)
    assert not canary.exists()


MANIFESTS = {
    "pickle": lambda canary: pickle_of(canary),
    "empty": lambda _: b"",
    "a list": lambda _: b"[]",
    "nested deeply": lambda _: nested(),
    "nested deeply inside": lambda _: b'{"origin": {"arguments": {"a": ' + nested() + b"}}}",
    "huge numbers": lambda _: b'{"format": 1, "documents": ' + b"9" * 5000 + b"}",
    "numbers of text": lambda _: b'{"format": "1"}',
    "more than there is": lambda _: b'{"format": 1, "code": "import os"}',
    "not UTF-8": lambda _: b'{"format": "\xff"}',
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_of_data_is_refused(what: str, data_set: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    Path(f"{data_set}.manifest.json").write_bytes(MANIFESTS[what](canary))
    with patience(), pytest.raises(DataError):
        read_manifest(data_set)
    assert not canary.exists()


def test_a_large_file_of_nothing_is_refused(data_set: Path, tmp_path: Path) -> None:
    for name, read, error in (
        ("run.yaml", lambda: load_run(tmp_path / "run.yaml"), ConfigError),
        ("config.json", lambda: read_hf_config(tmp_path), ValueError),
        ("x.manifest.json", lambda: read_manifest(data_set), DataError),
        ("x.idx", lambda: IndexedFile(data_set), DataError),
    ):
        sparse(tmp_path / name, 1 << 40)
        with patience(), pytest.raises(error):
            read()
