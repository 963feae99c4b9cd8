"""Text to token ids with a SentencePiece model. Control strings in text (<s>, </s>) stay text."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece


class Encoder:
    """A SentencePiece model and what is put around each document."""

    def __init__(self, model: Path, *, prepend_bos: bool, append_eos: bool):
        """Load the model.

        Raises:
            ValueError: no such model, or it lacks a token that is asked for.
        """
        try:
            serialized = model.read_bytes()
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(serialized)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"--tokenizer {model}: no SentencePiece model ({error}); give a tokenizer.model file"
            ) from None
        self.sha256 = hashlib.sha256(serialized).hexdigest()
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id = _or_none(self._model.bos_id()), _or_none(self._model.eos_id())
        self.unk_id, self.pad_id = _or_none(self._model.unk_id()), _or_none(self._model.pad_id())
        if prepend_bos and self.bos_id is None:
            raise ValueError(f"--tokenizer {model}: has no BOS; leave out --prepend-bos")
        if append_eos and self.eos_id is None:
            raise ValueError(f"--tokenizer {model}: has no EOS; use --no-append-eos")
        self.prepend_bos, self.append_eos = prepend_bos, append_eos
        self._before = [self.bos_id] if prepend_bos else []
        self._after = [self.eos_id] if append_eos else []

    def encode(self, texts: Sequence[str], *, workers: int) -> list[np.ndarray]:
        """Ids of each text, int32; a text without any tokens gives none at all, not even BOS and EOS.

        Args:
            texts: documents.
            workers: threads; the result does not depend on it.
        """
        encoded = self._model.Encode(list(texts), out_type=int, num_threads=workers)
        return [np.array([*self._before, *ids, *self._after] if ids else [], np.int32) for ids in encoded]


def _or_none(token: int) -> int | None:
    """SentencePiece says -1 for a token that a model does not have."""
    return token if token >= 0 else None
