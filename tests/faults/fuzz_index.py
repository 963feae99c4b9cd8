"""Mutations of .idx and .bin files that know their structure, through the reader. Run by `make fuzz`.

    python -m tests.faults.fuzz_index --mutations 1000000

Whatever is done to the files, the reader refuses them with a typed error or reads what the index says, in bounds.
"""

import argparse
import random
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from megalemur.data.errors import DataError
from megalemur.data.indexed import HEADER, IndexedFile
from megalemur.data.writer import IndexedWriter

_NUMBERS = (0, 1, 2, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_FIELDS = {9: "<Q", 17: "<B", 18: "<Q", 26: "<Q"}  # offsets in the header: version, dtype, sequences, borders


def write_pairs(directory: Path) -> list[tuple[bytes, bytes]]:
    """(.idx, .bin) of small data sets: one document, many, int32, several sequences a document."""
    generator = np.random.default_rng(0)
    pairs = []
    for name, documents, vocabulary in (("one", 1, 300), ("many", 40, 32000), ("wide", 9, 128256)):
        with IndexedWriter(directory / name, vocab_size=vocabulary) as writer:
            for _ in range(documents):
                writer.add(generator.integers(0, vocabulary, generator.integers(1, 30)))
            writer.commit()
        pairs.append(((directory / f"{name}.idx").read_bytes(), (directory / f"{name}.bin").read_bytes()))
    index, tokens = pairs[1]
    borders = np.array([0, 3, 3, 17, 40], "<i8")  # one of the documents is empty
    head = HEADER.pack(*HEADER.unpack(index[: HEADER.size])[:4], len(borders))
    pairs.append((head + index[HEADER.size : HEADER.size + 12 * 40] + borders.tobytes(), tokens))
    return pairs


def mutate(chance: random.Random, index: bytearray, tokens: bytearray) -> str:
    """Damage one of the two, or both alike; says how."""
    sequences = struct.unpack_from("<Q", index, 18)[0]
    kind = chance.choice(("field", "length", "pointer", "border", "bit", "cut", "grow", "tokens", "swap", "splice"))
    at = HEADER.size
    if kind == "field":
        offset = chance.choice(list(_FIELDS))
        value = chance.choice(_NUMBERS) & (2 ** (8 * struct.calcsize(_FIELDS[offset])) - 1)
        struct.pack_into(_FIELDS[offset], index, offset, value)
    elif kind == "length":
        struct.pack_into("<I", index, at + 4 * chance.randrange(sequences), chance.choice(_NUMBERS) & 0xFFFFFFFF)
    elif kind == "pointer":
        struct.pack_into("<Q", index, at + 4 * sequences + 8 * chance.randrange(sequences), chance.choice(_NUMBERS))
    elif kind == "border":
        borders = (len(index) - at - 12 * sequences) // 8
        struct.pack_into("<Q", index, at + 12 * sequences + 8 * chance.randrange(borders), chance.choice(_NUMBERS))
    elif kind == "bit":
        index[chance.randrange(len(index))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        target = chance.choice((index, tokens))
        del target[chance.randrange(len(target)) :]
    elif kind == "grow":
        chance.choice((index, tokens)).extend(chance.randbytes(chance.randrange(1, 40)))
    elif kind == "tokens":
        tokens[chance.randrange(len(tokens))] ^= 1 << chance.randrange(8)
    elif kind == "swap":
        a, b = (at + 8 * chance.randrange((len(index) - at) // 8) for _ in range(2))
        index[a : a + 8], index[b : b + 8] = index[b : b + 8], index[a : a + 8]
    else:
        start = chance.randrange(len(index))
        index[start:start] = index[:start][: chance.randrange(1, 30)]
    return kind


def read_everything(prefix: Path, chance: random.Random) -> None:
    """Open and read as a run does.

    Raises:
        DataError: the files are refused.
        AssertionError: what is read contradicts the index.
    """
    file = IndexedFile(prefix)
    bounds = file.document_bounds(0, file.num_documents)
    assert bounds[0] == 0 and bounds[-1] == file.num_tokens and (np.diff(bounds) >= 0).all()
    start = chance.randrange(file.num_tokens + 1)
    stop = chance.randrange(start, file.num_tokens + 1)
    assert len(file.tokens(start, stop)) == stop - start
    starts = file.document_starts(start, stop)
    assert ((starts >= start) & (starts < stop)).all() and np.isin(starts, bounds).all()
    if file.num_documents:
        number = chance.randrange(file.num_documents)
        assert len(file.document(number)) == bounds[number + 1] - bounds[number]


def fuzz(directory: Path, mutations: int, seed: int) -> Counter[str]:
    """How the mutations ended, by kind and by whether they were refused.

    Raises:
        Exception: anything but a typed error, with the mutation's number.
    """
    chance = random.Random(seed)
    pairs = write_pairs(directory)
    ended: Counter[str] = Counter()
    prefix = directory / "mutant"
    for number in range(mutations):
        index, tokens = map(bytearray, chance.choice(pairs))
        kinds = [mutate(chance, index, tokens)]
        if len(index) > HEADER.size + 32 and len(tokens) > 1 and chance.random() < 0.2:
            try:
                kinds.append(mutate(chance, index, tokens))
            except (struct.error, ValueError, IndexError):  # the first mutation left no such place
                kinds.append("none")
        Path(f"{prefix}.idx").write_bytes(index)
        Path(f"{prefix}.bin").write_bytes(tokens)
        try:
            read_everything(prefix, chance)
            ended[f"{kinds[0]}: read"] += 1
        except DataError:
            ended[f"{kinds[0]}: refused"] += 1
        except Exception as error:
            error.add_note(f"seed {seed}, mutation {number}: {kinds}")
            raise
    return ended


def main() -> None:
    """Parse, try, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        ended = fuzz(Path(scratch), args.mutations, args.seed)
    sys.stdout.write("".join(f"{kind}: {count:,}\n" for kind, count in sorted(ended.items())))


if __name__ == "__main__":
    main()
