"""Sources with their files open: what a run file names, checked against the model before any step.

Refuses files that are damaged, tokens that the model does not have, and data sets made with different tokenizers.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megalemur.config.data import SourceConfig
from megalemur.data.errors import VocabularyError
from megalemur.data.history import Share
from megalemur.data.indexed import IndexedFile, bin_path
from megalemur.data.manifest import Manifest, manifest_path, read_manifest
from megalemur.data.windows import Sample, SampleSource, Windows, read_sample

_PIECES, _PIECE_TOKENS = 64, 4096


class OpenSource(NamedTuple):
    """A source with its files open."""

    config: SourceConfig
    samples: SampleSource
    manifest: Manifest | None
    vocab_size: int
    """The model's: every id is below it."""

    @property
    def key(self) -> str:
        """What the order and the ledger know it by."""
        return self.samples.file.digest

    def sample(self, index: int) -> Sample:
        """The index-th sample.

        Raises:
            VocabularyError: it holds an id that the model does not have.
        """
        sample = read_sample(self.samples, index)
        bad = (sample.tokens >= self.vocab_size) | (sample.tokens < 0)
        if bad.any():
            at = int(bad.argmax())
            raise VocabularyError(
                f"data source {self.config.name} ({bin_path(self.config.path)}): sample {index}, tokens "
                f"{[tuple(span) for span in self.samples.spans(index)]}: id {sample.tokens[at]} at its position {at} "
                f"is outside model.vocab_size={self.vocab_size}; made with another tokenizer, or damaged"
            )
        return sample


def open_source(source: SourceConfig, sequence_length: int, *, seed: int | None, vocab_size: int) -> OpenSource:
    """Open one source and check its manifest, its size and 64 pieces of its tokens.

    Args:
        source: its settings.
        sequence_length: tokens a sample.
        seed: of its order; None: as in the file.
        vocab_size: the model's, without padding.

    Raises:
        ValueError: it is too short for one sample.
        DataError: missing, damaged, or of another vocabulary.
    """
    file = IndexedFile(source.path)
    manifest = read_manifest(source.path)
    if manifest is not None and manifest.vocab_size > vocab_size:
        raise VocabularyError(
            f"{manifest_path(source.path)}: made with a tokenizer of {manifest.vocab_size} pieces, more than "
            f"model.vocab_size={vocab_size}; use the tokenizer of the model, or set model.vocab_size"
        )
    last = max(0, file.num_tokens - _PIECE_TOKENS)
    for at in sorted({last * k // (_PIECES - 1) for k in range(_PIECES)}):
        piece = file.tokens(at, min(at + _PIECE_TOKENS, file.num_tokens))
        if piece.size and not 0 <= piece.min() <= piece.max() < vocab_size:
            raise VocabularyError(
                f"{bin_path(source.path)}: tokens [{at}, {at + piece.size}) hold ids {piece.min()} to {piece.max()}, "
                f"outside model.vocab_size={vocab_size}; the data were made with another tokenizer, or are damaged"
            )
    return OpenSource(source, Windows(file, sequence_length, seed=seed), manifest, vocab_size)


def _tokenizer_digest(tokenizer: Path) -> str | None:
    """sha256 of the SentencePiece model at or in `tokenizer`; None where there is none to compare."""
    model = tokenizer / "tokenizer.model" if tokenizer.is_dir() else tokenizer
    if not model.is_file():
        if tokenizer.exists():
            return None
        raise ValueError(f"data.tokenizer={tokenizer}: no such file or directory; give the tokenizer of the sources")
    return hashlib.sha256(model.read_bytes()).hexdigest()


def check_tokenizers(sources: Sequence[OpenSource], tokenizer: Path | None) -> None:
    """One tokenizer made everything. Sources without a manifest are believed.

    https://github.com/huggingface/datatrove/issues/345: a wrong BOS or EOS corrupts data without a word.

    Raises:
        ValueError: data.tokenizer does not exist.
        VocabularyError: two sources, or a source and data.tokenizer, differ.
    """
    wanted, origin = None if tokenizer is None else _tokenizer_digest(tokenizer), f"data.tokenizer={tokenizer}"
    for source in sources:
        if source.manifest is None:
            continue
        if wanted is None:
            wanted, origin = source.manifest.tokenizer_sha256, str(manifest_path(source.config.path))
        if source.manifest.tokenizer_sha256 != wanted:
            raise VocabularyError(
                f"{manifest_path(source.config.path)}: made with the tokenizer of sha256 "
                f"{source.manifest.tokenizer_sha256[:16]}…, but {origin} has {wanted[:16]}…; build one of them again"
            )


def shares_of(sources: Sequence[OpenSource]) -> tuple[Share, ...]:
    """The blend that the settings ask for; weights as they are written, not as binary fractions.

    Raises:
        ValueError: two sources hold the same data.
    """
    names: dict[str, str] = {}
    for source in sources:
        twin = names.setdefault(source.key, source.config.name)
        if twin != source.config.name:
            raise ValueError(
                f"data.sources: {twin} and {source.config.name} hold the same data; keep one, "
                "with the sum of their weights"
            )
    return tuple(
        Share(key=source.key, name=source.config.name, weight=repr(source.config.weight)) for source in sources
    )
