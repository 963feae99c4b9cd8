"""Sources with their files open: what a run file names, checked against the model before any step.

Refuses files that are damaged, tokens that the model does not have, and data sets made with different tokenizers.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megalemur.config.data import SourceConfig
from megalemur.config.plain_files import read_plain
from megalemur.data.errors import VocabularyError
from megalemur.data.history import Share
from megalemur.data.indexed import IndexedFile, bin_path
from megalemur.data.manifest import Manifest, manifest_path, read_manifest
from megalemur.data.windows import Sample, SampleSource, Windows, read_sample

_log = logging.getLogger(__name__)

_PIECES, _PIECE_TOKENS = 64, 4096
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


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
    manifest = read_manifest(source.path)
    file = _open_file(source.path, manifest)
    if manifest is not None and manifest.tokenizer.vocab_size > vocab_size:
        raise VocabularyError(
            f"{manifest_path(source.path)}: made with a tokenizer of {manifest.tokenizer.vocab_size} pieces, more than "
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


def _open_file(prefix: Path, manifest: Manifest | None) -> IndexedFile:
    """The files of a source; its index is read through unless the manifest vouches for it."""
    if manifest is None:
        _log.warning(
            "%s: no such file: nothing says which tokenizer made the data, and their index is checked as a whole",
            manifest_path(prefix),
        )
        return IndexedFile(prefix)
    return IndexedFile(prefix, vouched_digest=manifest.digest if manifest.vouches(prefix) else None)


def _tokenizer_digests(tokenizer: Path) -> set[str]:
    """sha256 of the tokenizer file, or of those in a directory: its .model and its .json are one tokenizer."""
    if not tokenizer.exists():
        raise ValueError(f"data.tokenizer={tokenizer}: no such file or directory; give the tokenizer of the sources")
    files = [tokenizer]
    if tokenizer.is_dir():
        files = [path for name in _TOKENIZER_FILES if (path := tokenizer / name).is_file()]
    try:
        return {hashlib.sha256(read_plain(file)).hexdigest() for file in files}
    except OSError as error:
        raise ValueError(f"data.tokenizer={tokenizer}: {error.strerror}") from None


def check_tokenizers(sources: Sequence[OpenSource], tokenizer: Path | None) -> None:
    """One tokenizer made everything. Sources without a manifest are believed.

    https://github.com/decoderesearch/SAELens/issues/146: data of another tokenizer train to a high loss, without a
    word.

    Raises:
        ValueError: data.tokenizer does not exist.
        VocabularyError: two sources, or a source and data.tokenizer, differ.
    """
    wanted, origin = set() if tokenizer is None else _tokenizer_digests(tokenizer), f"data.tokenizer={tokenizer}"
    for source in sources:
        if source.manifest is None:
            continue
        made_with = source.manifest.tokenizer.sha256
        if not wanted:
            wanted, origin = {made_with}, str(manifest_path(source.config.path))
        if made_with not in wanted:
            has = " and ".join(f"{digest[:16]}…" for digest in sorted(wanted))
            raise VocabularyError(
                f"{manifest_path(source.config.path)}: made with the tokenizer of sha256 {made_with[:16]}…, but "
                f"{origin} has {has}; build one of them again"
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
