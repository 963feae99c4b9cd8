"""Several data sets one after another as one. Parts of one build are put into their order and must be complete."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalemur.data.indexed import IndexedFile, bin_path
from megalemur.data.manifest import InputRecord, Manifest, TokenizerRecord, manifest_path, read_manifest
from megalemur.data.writer import IndexedWriter

_BLOCK = 1 << 20  # documents whose lengths are held at once


def in_order(prefixes: Sequence[Path], manifests: Sequence[Manifest]) -> list[tuple[Path, Manifest]]:
    """As given; parts of one build by their numbers.

    Raises:
        ValueError: parts of different builds, a part twice, missing parts, or other tokenizers or document ends.
    """
    pairs = list(zip(prefixes, manifests, strict=True))
    _refuse_mixture(pairs)
    parts = [manifest.part for manifest in manifests]
    if all(part is None for part in parts):
        return pairs
    counts, plans = {part and part[1] for part in parts}, {manifest.plan for manifest in manifests}
    if len(counts) != 1 or len(plans) != 1 or None in counts:
        raise ValueError("these are parts of different builds, or parts and whole data sets; merge parts of one build")
    (count,) = counts
    numbers = Counter(part[0] for part in parts if part is not None)
    missing = [number for number in range(count or 0) if number not in numbers]
    if missing:
        raise ValueError(f"parts {', '.join(map(str, missing))} of {count} are missing; build them first")
    twice = [number for number, times in numbers.items() if times > 1]
    if twice:
        raise ValueError(f"part {twice[0]} is given more than once; its documents would count double")
    return sorted(pairs, key=lambda pair: pair[1].part or (0, 1))


def _refuse_mixture(pairs: Sequence[tuple[Path, Manifest]]) -> None:
    first_path, first = pairs[0]
    for path, manifest in pairs[1:]:
        if manifest.tokenizer != first.tokenizer:
            raise ValueError(
                f"{manifest_path(path)} was made with another tokenizer ({manifest.tokenizer.sha256[:16]}…) than "
                f"{manifest_path(first_path)} ({first.tokenizer.sha256[:16]}…); build one of them again"
            )
        if (manifest.prepend_bos, manifest.append_eos) != (first.prepend_bos, first.append_eos):
            raise ValueError(
                f"{manifest_path(path)} and {manifest_path(first_path)} differ in BOS or EOS around documents; build "
                "one of them again"
            )


def append_all(file: IndexedFile, writer: IndexedWriter) -> int:
    """Append all documents of a data set; returns how many empty ones were left out."""
    empty = 0
    with bin_path(file.prefix).open("rb") as stream:
        for first in range(0, file.num_documents, _BLOCK):
            bounds = file.document_bounds(first, min(first + _BLOCK, file.num_documents))
            lengths = np.diff(bounds)
            empty += int(np.count_nonzero(lengths == 0))
            tokens, lengths = file.tokens(int(bounds[0]), int(bounds[-1])), lengths[lengths > 0].astype(np.int32)
            if file.dtype == writer.dtype:
                writer.add_extent(stream.fileno(), int(bounds[0]) * file.dtype.itemsize, tokens, lengths)
            else:
                writer.add_many(tokens, lengths)
    return empty


def merged_inputs(manifests: Sequence[Manifest]) -> tuple[InputRecord, ...]:
    """Records of all inputs; those of one file in several parts are added up."""
    found: dict[str, InputRecord] = {}
    for one in (record for manifest in manifests for record in manifest.inputs):
        before = found.get(one.name)
        if before is None:
            found[one.name] = one
            continue
        sums = {
            key: getattr(before, key) + getattr(one, key)
            for key in ("documents", "empty_documents", "bad", "tokens", "text_bytes")
        }
        found[one.name] = before.model_copy(update=sums)
    return tuple(found.values())


def tokenizer_of(manifests: Sequence[Manifest | None], vocab_size: int | None) -> tuple[TokenizerRecord | None, int]:
    """(the tokenizer, its vocabulary) of data sets that all have a manifest, or none of which has one.

    Raises:
        ValueError: some have one, or the vocabulary is unknown.
    """
    known = [manifest for manifest in manifests if manifest is not None]
    if known and len(known) == len(manifests):
        return known[0].tokenizer, known[0].tokenizer.vocab_size
    if known:
        raise ValueError("some of these data sets have a manifest and some have none; build the others again")
    if vocab_size is None:
        raise ValueError("no manifest says how large the vocabulary is; give --vocab-size")
    return None, vocab_size


def read_manifests(prefixes: Sequence[Path]) -> list[Manifest | None]:
    """The manifest of each data set."""
    return [read_manifest(prefix) for prefix in prefixes]
