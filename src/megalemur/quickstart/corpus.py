"""Real text that is on every machine with Python: the standard library's sources, its documentation, licence texts.

Refuses nothing; files that are not UTF-8 are passed over and counted.
"""

import sysconfig
import zlib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import orjson


class Corpus(NamedTuple):
    """JSON lines of one kind of text."""

    train: Path
    validation: Path
    documents: int
    bytes: int


_SMALLEST = 500
"""Characters: shorter files teach nothing."""
_LARGEST = 60_000
"""Characters: a few generated tables would otherwise be most of the corpus."""
_HELD_OUT = 20
"""One document in this many is kept for validation."""


def code_documents() -> Iterator[str]:
    """Sources of the standard library, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"} & set(parts):
            yield path.read_text("utf-8", errors="replace")


def text_documents() -> Iterator[str]:
    """The language reference that pydoc carries, and descriptions and licences of the installed packages."""
    from pydoc_data.topics import topics

    yield from topics.values()
    for distribution in sorted(distributions(), key=lambda d: d.metadata["Name"].lower()):
        yield str(distribution.metadata.json.get("description", ""))
        for file in distribution.files or ():
            if "licen" in file.name.lower() and file.suffix in ("", ".txt", ".md", ".rst"):
                path = Path(str(distribution.locate_file(file)))
                if path.is_file():
                    yield path.read_text("utf-8", errors="replace")


def write_corpus(documents: Iterator[str], name: str, directory: Path, most_bytes: int) -> Corpus:
    """Write distinct documents as JSON lines, one in twenty to the validation file; by their content, so never moving.

    Args:
        documents: texts.
        name: `NAME.jsonl` and `NAME_validation.jsonl` are written.
        directory: where.
        most_bytes: stop after this many bytes of text.
    """
    directory.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(directory / f"{name}.jsonl", directory / f"{name}_validation.jsonl", 0, 0)
    seen: set[int] = set()
    total = 0
    with corpus.train.open("wb") as train, corpus.validation.open("wb") as validation:
        for document in documents:
            text = document[:_LARGEST]
            key = zlib.crc32(text.encode())
            if len(text) < _SMALLEST or "\ufffd" in text or key in seen:
                continue
            seen.add(key)
            (validation if key % _HELD_OUT == 0 else train).write(orjson.dumps({"text": text}) + b"\n")
            total += len(text.encode())
            if total >= most_bytes:
                break
    return corpus._replace(documents=len(seen), bytes=total)
