"""The tokenizer that lies in a checkpoint, behind two functions, and the ids that end a text."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from megalemur.checkpoint.opening import SmallFiles
from megalemur.config.strict_json import parse_json


class Tokenizer(Protocol):
    """Text to ids and back."""

    eos: int | None
    """End of a sequence, as the tokenizer itself knows it."""

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the beginning-of-sequence id in front where the tokenizer has one."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""


class SentencePieceTokenizer:
    """tokenizer.model."""

    def __init__(self, data: bytes):
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_proto=data)
        eos, bos = self._model.eos_id(), self._model.bos_id()
        self.eos = eos if eos >= 0 else None
        self._start = [bos] if bos >= 0 else []

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt."""
        return self._start + self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self._model.decode(ids)


class HuggingFaceTokenizer:
    """tokenizer.json."""

    def __init__(self, data: bytes):
        from tokenizers import Tokenizer as Fast

        self._model = Fast.from_buffer(data)
        self.eos = next((i for i in map(self._model.token_to_id, ("</s>", "<|end_of_text|>")) if i is not None), None)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt."""
        return self._model.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self._model.decode(ids)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in a checkpoint.

    Raises:
        ValueError: there is none, or a library cannot read it.
        DamagedCheckpoint: it is not the one that was saved.
    """
    kinds: dict[str, Callable[[bytes], Tokenizer]] = {
        "tokenizer.model": SentencePieceTokenizer,
        "tokenizer.json": HuggingFaceTokenizer,
    }
    files = SmallFiles(directory)
    for name, kind in kinds.items():
        data = files.get(name)
        if data is not None:
            try:
                if not data:  # sentencepiece takes nothing for a model that comes later
                    raise ValueError("the file is empty")
                return kind(data)
            except Exception as error:  # tokenizers raises nothing more special
                raise ValueError(f"{directory / name} is no tokenizer: {error}") from None
    raise ValueError(f"{directory} holds neither tokenizer.model nor tokenizer.json; copy the model's tokenizer there")


def stop_ids(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokenizer's end of a sequence, and those of generation_config.json: chat models end a turn with others.

    Raises:
        ValueError: generation_config.json is there and cannot be used.
    """
    stops = set() if tokenizer.eos is None else {tokenizer.eos}
    data = SmallFiles(directory).get("generation_config.json")
    if data is not None:
        try:
            said = parse_json(data).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{directory / 'generation_config.json'} cannot be used: {error}") from None
        given = said if isinstance(said, list) else [said]
        stops |= {i for i in given if isinstance(i, int)}
    return frozenset(stops)
