"""Documents in, an indexed data set and its manifest out, in constant memory; nothing appears before all is written."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_prep.encoder import Encoder
from megalemur.data.indexed import HEADER
from megalemur.data.manifest import Manifest
from megalemur.data.writer import IndexedWriter

# characters encoded at a time: enough to keep every thread busy, little beside a SentencePiece model
_BATCH_CHARACTERS = 1 << 22


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text) + 1
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def build_index(documents: Iterable[str], encoder: Encoder, output: Path, *, workers: int = 1) -> Manifest:
    """Write OUTPUT.bin, OUTPUT.idx and OUTPUT.manifest.json, replacing older ones at the very end.

    Args:
        documents: texts, in the order in which they are to stand; empty ones are left out and counted.
        encoder: the tokenizer.
        output: prefix.
        workers: encoding threads; the files do not depend on it.

    Raises:
        ValueError: a document that cannot be read, or no tokens in all.
    """
    empty = unknown = 0
    with IndexedWriter(output, vocab_size=encoder.vocab_size) as writer:
        for batch in _batches(documents):
            for ids in encoder.encode(batch, workers=workers):
                if not ids.size:
                    empty += 1
                    continue
                writer.add(ids)
                unknown += int(np.count_nonzero(ids == encoder.unk_id)) if encoder.unk_id is not None else 0
        if not writer.num_tokens:
            raise ValueError(f"{output}: the input has {empty} documents and no text; give files with text in them")
        manifest = _manifest(writer, encoder, empty=empty, unknown=unknown)
        writer.commit(manifest=manifest.model_dump_json(indent=2).encode() + b"\n")
    return manifest


def _manifest(writer: IndexedWriter, encoder: Encoder, *, empty: int, unknown: int) -> Manifest:
    return Manifest(
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        bos_id=encoder.bos_id,
        eos_id=encoder.eos_id,
        unk_id=encoder.unk_id,
        pad_id=encoder.pad_id,
        prepend_bos=encoder.prepend_bos,
        append_eos=encoder.append_eos,
        documents=writer.num_documents,
        empty_documents=empty,
        tokens=writer.num_tokens,
        unknown_tokens=unknown,
        dtype=writer.dtype.name,
        bin_bytes=writer.num_tokens * writer.dtype.itemsize,
        idx_bytes=HEADER.size + 12 * writer.num_documents + 8 * (writer.num_documents + 1),
    )
