"""Reads every byte of a data set and compares it with its manifest. Says what is damaged and where; changes nothing."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from megalemur.data.errors import DamagedDataError
from megalemur.data.indexed import IndexedFile, bin_path, idx_path
from megalemur.data.manifest import CHUNK_BYTES, Manifest, manifest_path, read_manifest

_BLOCK = 1 << 18  # documents looked at together


class Facts(NamedTuple):
    """What a chunk of tokens holds."""

    highest: int
    lowest: int
    ends: int
    """Tokens that are EOS."""
    damaged: bool


class Verified(NamedTuple):
    """A data set that was read through."""

    file: IndexedFile
    manifest: Manifest | None
    problems: list[str]
    """Empty: all is well."""
    times: dict[Literal["bin", "idx"], int]
    """When each file was last changed before it was read, ns: what was read is of that time or later."""


def verify(prefix: Path, *, vocab_size: int | None = None, threads: int = 1) -> Verified:
    """Check structure, digests, ids and document ends.

    Args:
        prefix: of the data set.
        vocab_size: ids must be below it; None: the manifest's, or unchecked without one.
        threads: that read; digests and numpy let go of the interpreter.

    Raises:
        DataError: the files cannot even be opened; the message says why.
    """
    manifest = read_manifest(prefix)
    times = _times(prefix)
    problems = list(_damaged_index(prefix, manifest))
    if problems:  # the borders would be wrong: say so first
        raise DamagedDataError("; ".join(problems))
    file = IndexedFile(prefix)
    limit = vocab_size or (manifest.tokenizer.vocab_size if manifest else None)
    eos = manifest.tokenizer.eos_id if manifest and manifest.append_eos else None
    size = manifest.files["bin"].chunk_bytes if manifest else CHUNK_BYTES
    count = -(-bin_path(prefix).stat().st_size // size)
    with ThreadPoolExecutor(threads) as pool:
        facts = list(pool.map(lambda k: _look(file, manifest, k, (size, eos)), range(count)))
    problems += _damaged_ranges(file, facts, size)
    problems += _wrong_ids(file, facts, size, limit)
    if manifest is not None:
        problems += _wrong_totals(file, manifest, facts)
    return Verified(file, manifest, problems, times)


def open_trusted(prefix: Path, manifest: Manifest | None) -> IndexedFile:
    """A data set whose bytes are those of its manifest: vouched for, or read through now.

    Whoever copies documents digests them anew, and damage that got in would be vouched for ever after.

    Raises:
        DamagedDataError: they are not.
    """
    if manifest is None:
        return IndexedFile(prefix)
    if manifest.vouches(prefix):
        return IndexedFile(prefix, vouched_digest=manifest.digest)
    verified = verify(prefix, threads=os.cpu_count() or 1)
    if verified.problems:
        raise DamagedDataError("; ".join(verified.problems))
    return verified.file


def refreshed(verified: Verified) -> Manifest | None:
    """The manifest with the files' present times, so that it vouches for them from now on."""
    manifest = verified.manifest
    if manifest is None:
        return None
    files = {
        name: record.model_copy(update={"mtime_ns": verified.times[name]}) for name, record in manifest.files.items()
    }
    return manifest.model_copy(update={"files": files})


def _times(prefix: Path) -> dict[Literal["bin", "idx"], int]:
    """Of the files that are there; opening them says what is missing."""
    paths: dict[Literal["bin", "idx"], Path] = {"bin": bin_path(prefix), "idx": idx_path(prefix)}
    return {name: path.stat().st_mtime_ns for name, path in paths.items() if path.exists()}


def _damaged_index(prefix: Path, manifest: Manifest | None) -> Iterator[str]:
    path = idx_path(prefix)
    if manifest is None or not path.exists():
        return
    record, bad = manifest.files["idx"], []
    with path.open("rb") as stream:
        for number, digest in enumerate(record.chunks):
            if xxhash.xxh3_128_hexdigest(stream.read(record.chunk_bytes)) != digest:
                bad.append(number)
    for first, stop in _runs(bad):
        yield f"{path}: bytes [{first * record.chunk_bytes}, {stop * record.chunk_bytes}) are not what was written"


def _look(file: IndexedFile, manifest: Manifest | None, number: int, how: tuple[int, int | None]) -> Facts:
    size, eos = how
    width = file.dtype.itemsize
    first, stop = number * size // width, min((number + 1) * size // width, file.num_tokens)
    tokens = file.tokens(first, stop)
    damaged = manifest is not None and xxhash.xxh3_128_hexdigest(tokens.data) != manifest.files["bin"].chunks[number]
    ends = int(np.count_nonzero(tokens == eos)) if eos is not None else 0
    return Facts(int(tokens.max()), int(tokens.min()), ends, damaged)


def _damaged_ranges(file: IndexedFile, facts: list[Facts], size: int) -> Iterator[str]:
    path, width = bin_path(file.prefix), file.dtype.itemsize
    for first, stop in _runs([number for number, one in enumerate(facts) if one.damaged]):
        tokens = (first * size // width, min(stop * size // width, file.num_tokens))
        touched = _documents_of(file, *tokens)
        yield (
            f"{path}: bytes [{first * size}, {tokens[1] * width}) are not what was written: tokens [{tokens[0]}, "
            f"{tokens[1]}), documents {touched[0]} to {touched[1]}"
        )


def _documents_of(file: IndexedFile, first: int, stop: int) -> tuple[int, int]:
    """Numbers of the first and last document that touch tokens [first, stop)."""
    low, high = 0, file.num_documents
    bounds = []
    for token in (first, stop - 1):
        low, high = 0, file.num_documents
        while high - low > 1:
            middle = (low + high) // 2
            if file.document_bounds(middle, middle)[0] <= token:
                low = middle
            else:
                high = middle
        bounds.append(low)
    return bounds[0], bounds[1]


def _wrong_ids(file: IndexedFile, facts: list[Facts], size: int, limit: int | None) -> Iterator[str]:
    for number, one in enumerate(facts):
        if one.lowest < 0 or (limit is not None and one.highest >= limit):
            first = number * size // file.dtype.itemsize
            worst = one.lowest if one.lowest < 0 else one.highest
            yield f"{bin_path(file.prefix)}: id {worst} behind token {first} is outside the vocabulary of {limit}"
            return


def _wrong_totals(file: IndexedFile, manifest: Manifest, facts: list[Facts]) -> Iterator[str]:
    path = manifest_path(file.prefix)
    for what, said, found in (
        ("documents", manifest.documents, file.num_documents),
        ("tokens", manifest.tokens, file.num_tokens),
        ("the digest", manifest.digest, file.digest),
    ):
        if said != found:
            yield f"{path}: {what}: {said} there, {found} in the files"
    eos = manifest.tokenizer.eos_id
    if manifest.append_eos and eos is not None:
        ends = sum(one.ends for one in facts)
        if ends != file.num_documents:
            yield f"{bin_path(file.prefix)}: EOS (id {eos}) stands {ends} times in {file.num_documents} documents"
        yield from _without_end(file, eos)


def _without_end(file: IndexedFile, eos: int) -> Iterator[str]:
    everything = file.tokens(0, file.num_tokens)
    for first in range(0, file.num_documents, _BLOCK):
        ends = file.document_bounds(first, min(first + _BLOCK, file.num_documents))[1:]
        wrong = everything[ends - 1] != eos
        if wrong.any():
            yield f"{bin_path(file.prefix)}: document {first + int(wrong.argmax())} does not end with EOS (id {eos})"
            return


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """[first, stop) of consecutive numbers; they rise."""
    first = stop = -1
    for number in numbers:
        if number != stop:
            if stop > first:
                yield first, stop
            first = number
        stop = number + 1
    if stop > first:
        yield first, stop
