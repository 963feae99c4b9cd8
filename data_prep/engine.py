"""The fast engine, where it gives the reference's ids: tried on this input before the build, and again during it."""

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import orjson

from data_prep.convert import tokenizer_json
from data_prep.tokenizer import Encoded, HuggingFaceTokenizer, tokenizer_file

Choice = Literal["auto", "fast", "reference"]

_COMPARED_TEXTS, _COMPARED_CHARACTERS = 16, 1 << 12  # of each batch
_TIMED_CHARACTERS = 2000

ONE_THREAD = {
    "FASTOKENS_BPE_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""Environment in which an engine keeps to the thread that calls it; read when it first encodes."""

PROBES = (
    *("", " ", "  ", "a", " a", "  a  ", "\n", "\n\n  x\t", "a\r\nb", "\x00"),
    *("\u2581", "a\u2581b", "\ufeffx", "\u200b", "e\u0301", "\U0010ffff"),
    *("<s>", "</s>", "<unk>", "<0x0A>", "<|im_start|>user\n", "[INST] x [/INST]", "<|endoftext|>", "a</s>b"),
    *("é", "ﬁ", "Ⅷ", "你好，世界", "🙂👩👧", "नमस्ते", "ｆｕｌｌ", "1234567890", "0x7fff"),
    "def f(x):\n\treturn {'a': [x] * 3}  # ok\n",
)
"""Texts on which tokenizers are known to differ."""


class Engine(Protocol):
    """What encodes."""

    name: str
    """Package and version."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids without BOS and EOS."""


class Fastokens:
    """The package fastokens; it starts a thread for each core unless the environment is ONE_THREAD."""

    def __init__(self, definition: dict[str, Any]):
        import fastokens

        self.name = f"fastokens {version('fastokens')}"
        self._model = fastokens.Tokenizer.from_json_str(orjson.dumps(definition).decode())

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids without BOS and EOS."""
        ids, offsets = self._model.encode_batch_flat(list(texts), split_special_tokens=True)
        return Encoded(np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64)))


def fast_engine(path: Path) -> Fastokens | None:
    """The fast engine for a tokenizer, or None where it does not know such a tokenizer."""
    path = tokenizer_file(path)
    if path.suffix == ".json":
        definition: dict[str, Any] | None = HuggingFaceTokenizer(path, path.read_bytes()).json
    else:
        definition = tokenizer_json(path.read_bytes())
    if definition is None:
        return None
    try:
        return Fastokens(definition)
    except Exception:  # whatever it says of a tokenizer that it cannot take: there is the reference
        return None


def choose_engine(
    fast: Engine | None, reference: Engine, choice: Choice, sample: Sequence[Sequence[str]]
) -> tuple[Literal["fast", "reference"], str]:
    """(the engine, why): the fast one only if its ids are the reference's on texts of the input and all probes.

    `auto` also wants it to be fast: its cache of words degenerates where very many words differ in a few digits, as in
    tiny numbered documents, and it then is slower than the reference.

    Args:
        fast: None where it does not know the tokenizer.
        reference: what is right.
        choice: what was asked.
        sample: batches of texts from all over the input.

    Raises:
        ValueError: the fast engine was asked for and does not give the reference's ids.
    """
    if choice == "reference":
        return "reference", f"{reference.name}, as asked"
    if fast is None:
        reason = f"fastokens does not know such a tokenizer, so {reference.name} encodes"
    else:
        compared = [text[:_COMPARED_CHARACTERS] for batch in sample for text in batch[:_COMPARED_TEXTS]]
        texts = [*PROBES, *compared]
        (theirs,), slowly = _timed(reference, [texts])
        different = _difference(fast.encode(texts), theirs)
        if different is None:
            _, quickly = _timed(fast, sample)
            if choice == "fast" or quickly > slowly or sum(map(len, compared)) < _TIMED_CHARACTERS:
                return (
                    "fast",
                    f"{fast.name} gives {reference.name}'s ids on {len(texts):,} texts of and beside this input",
                )
            return "reference", f"{reference.name}: here {fast.name} is slower ({quickly:.1f} to {slowly:.1f} MB/s)"
        reason = f"{fast.name} gives other ids than {reference.name} for {texts[different][:60]!r}"
    if choice == "fast":
        raise ValueError(f"--engine fast: {reason}; use --engine auto or reference")
    return "reference", reason


def _timed(engine: Engine, batches: Sequence[Sequence[str]]) -> tuple[list[Encoded], float]:
    """(ids of each batch, MB of text a second)."""
    began = time.process_time()
    encoded = [engine.encode(batch) for batch in batches]
    characters = sum(len(text) for batch in batches for text in batch)
    return encoded, characters / 1e6 / max(time.process_time() - began, 1e-6)


def first_difference(engine: Engine, reference: Engine, texts: Sequence[str]) -> int | None:
    """Number of the first text that the two encode differently; None where there is none."""
    return _difference(engine.encode(texts), reference.encode(texts))


def _difference(ours: Encoded, theirs: Encoded) -> int | None:
    if np.array_equal(ours.lengths, theirs.lengths) and np.array_equal(ours.ids, theirs.ids):
        return None
    return next(k for k in range(len(ours.lengths)) if not np.array_equal(ours.text(k), theirs.text(k)))
