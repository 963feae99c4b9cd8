"""Small indexed data sets with their manifests."""

import hashlib
import importlib.resources
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalemur.data.indexed import HEADER, MAGIC, VERSION, IndexedFile
from megalemur.data.manifest import InputRecord, Manifest, Origin, TokenizerRecord
from megalemur.data.writer import IndexedWriter, Written

MODEL = Path(str(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"))
"""A Llama-style SentencePiece model: 32,000 pieces, byte fallback, unk 0, bos 1, eos 2."""


def tokenizer_record(tokenizer: bytes = b"a tokenizer", vocab_size: int = 32000, **changes: Any) -> TokenizerRecord:
    """A tokenizer known by the digest of some bytes."""
    ids: dict[str, int | None] = {"bos_id": 1, "eos_id": 2, "unk_id": 0, "pad_id": None}
    digest = hashlib.sha256(tokenizer).hexdigest()
    return TokenizerRecord(kind="sentencepiece", sha256=digest, vocab_size=vocab_size, **{**ids, **changes})


def manifest_of(written: Written, tokenizer: TokenizerRecord, **changes: Any) -> Manifest:
    """A manifest of what was written, as if by build_index."""
    source = InputRecord(
        name="source.jsonl",
        bytes=None,
        mtime_ns=None,
        documents=written.documents,
        empty_documents=0,
        bad=0,
        tokens=written.tokens,
        text_bytes=4 * written.tokens,
    )
    values: dict[str, Any] = {
        **written._asdict(),
        "tokenizer": tokenizer,
        "prepend_bos": False,
        "append_eos": True,
        "unknown_tokens": 0,
        "inputs": (source,),
        "origin": Origin(tool="build_index", version="0", arguments={}, finished="2026-01-01T00:00:00+00:00"),
    }
    return Manifest(**{**values, **changes})


def write_dataset(
    prefix: Path, documents: Iterable[Sequence[int]], tokenizer: TokenizerRecord | None = None, **changes: Any
) -> Path:
    """An indexed data set of these documents, with a manifest."""
    tokenizer = tokenizer or tokenizer_record()
    with IndexedWriter(prefix, vocab_size=tokenizer.vocab_size) as writer:
        for document in documents:
            writer.add(document)
        writer.commit(lambda written: manifest_of(written, tokenizer, **changes))
    return prefix


def write_holes(prefix: Path, documents: int, tokens: int, first_id: int) -> Path:
    """A data set of large documents that take no room: holes, but for their first tokens, first_id and so on."""
    lengths = np.full(documents, tokens, "<i4")
    starts = np.arange(documents, dtype="<i8") * tokens * 2
    with Path(f"{prefix}.idx").open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        for column in (lengths, starts, np.arange(documents + 1)):
            stream.write(column.tobytes())
    with Path(f"{prefix}.bin").open("wb") as stream:
        for number, start in enumerate(starts.tolist()):
            stream.seek(start)
            stream.write((first_id + number).to_bytes(2, "little"))
        stream.truncate(documents * tokens * 2)
    return prefix


def refuse_wrong_holes(prefix: Path, documents: int, tokens: int, first_id: int) -> None:
    """Whether a data set is what `write_holes` would have written; looks at both ends of every document."""
    file = IndexedFile(prefix)
    assert file.document_bounds(0, documents).tolist() == [k * tokens for k in range(documents + 1)]
    for number in range(documents):
        document = file.document(number)
        assert (document[0], document[1], document[-1]) == (first_id + number, 0, 0)
