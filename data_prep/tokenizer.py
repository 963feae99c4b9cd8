"""Text to token ids and back, by the reference implementation of a tokenizer: sentencepiece, or tokenizers.

Names of control tokens in text (<s>, <|im_start|>) stay text: whoever writes them in a document must not end it.
Refuses tokenizers that cannot be read, and ids that are control tokens.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from megalemur.config.plain_files import read_plain
from megalemur.config.strict_json import parse_json
from megalemur.data.manifest import TokenizerRecord

_BEGIN = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>")
_END = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]")
_LOOKS_LIKE_CONTROL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Encoded(NamedTuple):
    """Ids of several texts."""

    ids: np.ndarray
    """All of them, one text after another, unsigned or signed 32-bit."""
    lengths: np.ndarray
    """Ids of each text, int64; 0 for an empty text."""

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "Encoded":
        """From a list of ids a text."""
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        ids = np.empty(int(lengths.sum()), np.int32)
        at = 0
        for one in lists:
            ids[at : at + len(one)] = one
            at += len(one)
        return cls(ids, lengths)

    def text(self, number: int) -> np.ndarray:
        """Ids of one text."""
        at = int(self.lengths[:number].sum())
        return self.ids[at : at + int(self.lengths[number])]


class Tokenizer(Protocol):
    """A reference tokenizer."""

    record: TokenizerRecord
    name: str
    """Package and version."""
    control: dict[str, int]
    """Control tokens: text to id."""
    byte_ids: np.ndarray
    """Ids of single bytes, to which text falls back that no piece covers."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids without BOS and EOS."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""

    def piece(self, token: int) -> str:
        """A single token as it is written in the vocabulary."""


class SentencePieceTokenizer:
    """A SentencePiece .model."""

    def __init__(self, path: Path, data: bytes):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(data)
        if _findable_control(self._model):
            self._model.LoadFromSerializedProto(_without_findable_control(data))
        model, size = self._model, self._model.vocab_size()
        self.name = f"sentencepiece {sentencepiece.__version__}"
        self.record = TokenizerRecord(
            kind="sentencepiece",
            sha256=hashlib.sha256(data).hexdigest(),
            vocab_size=size,
            **{f"{key}_id": _or_none(getattr(model, f"{key}_id")()) for key in ("bos", "eos", "unk", "pad")},
        )
        special = [i for i in range(size) if model.IsControl(i) or model.IsUnknown(i)]
        self.control = {model.IdToPiece(i): i for i in special}
        self.byte_ids = np.array([i for i in range(size) if model.IsByte(i)], np.int64)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids without BOS and EOS. Text is never matched with control pieces: sentencepiece does not."""
        return Encoded.of(self._model.Encode(list(texts), out_type=int, num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return self._model.Decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        """A single token as it is written in the vocabulary."""
        return self._model.IdToPiece(int(token))


class HuggingFaceTokenizer:
    """A tokenizer.json."""

    def __init__(self, path: Path, data: bytes):
        import tokenizers

        self.json, self.control = without_control(parse_json(data))
        whole = tokenizers.Tokenizer.from_str(data.decode())
        self._model = tokenizers.Tokenizer.from_str(json.dumps(self.json))
        self._whole = whole
        vocabulary = whole.get_vocab(with_added_tokens=True)
        moved = [
            one["content"] for one in self.json["added_tokens"] if self._model.token_to_id(one["content"]) != one["id"]
        ]
        if moved:
            raise ValueError(f"the added token {moved[0]!r} has another id than the file says")
        named = _named_tokens(path.parent)
        self.name = f"tokenizers {tokenizers.__version__}"
        self.record = TokenizerRecord(
            kind="huggingface",
            sha256=hashlib.sha256(data).hexdigest(),
            vocab_size=max(vocabulary.values()) + 1,
            bos_id=_first_known(vocabulary, named.get("bos_token"), _BEGIN),
            eos_id=_first_known(vocabulary, named.get("eos_token"), _END),
            unk_id=_first_known(vocabulary, named.get("unk_token"), (self.json.get("model", {}).get("unk_token"),)),
            pad_id=_first_known(vocabulary, named.get("pad_token"), ()),
        )
        for token in (self.record.bos_id, self.record.eos_id):
            if token is not None:
                self.control[str(whole.id_to_token(token))] = token
        self.byte_ids = np.array([i for text, i in vocabulary.items() if _BYTE.fullmatch(text)], np.int64)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids without BOS and EOS."""
        return Encoded.of([one.ids for one in self._model.encode_batch_fast(list(texts), add_special_tokens=False)])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return self._whole.decode([int(i) for i in ids], skip_special_tokens=False)

    def piece(self, token: int) -> str:
        """A single token as it is written in the vocabulary."""
        return self._whole.id_to_token(int(token)) or f"<{token}>"


def _findable_control(model: Any) -> list[str]:
    """Pieces written like control tokens that are not of a kind which sentencepiece never finds in text."""
    size = model.vocab_size()
    return [
        piece
        for number, piece in enumerate(model.IdToPiece(list(range(size))))
        if _LOOKS_LIKE_CONTROL.fullmatch(piece)
        and not (model.IsControl(number) or model.IsUnknown(number) or model.IsByte(number))
    ]


def _without_findable_control(data: bytes) -> bytes:
    """The model with user-defined pieces that are written like control tokens (<|im_start|>) made control pieces.

    sentencepiece finds user-defined pieces wherever they stand in text. Ids stay; pieces that text is merged to stay.
    """
    from sentencepiece import sentencepiece_model_pb2 as definitions

    proto = definitions.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    proto.ParseFromString(data)
    kinds = proto.SentencePiece
    for piece in proto.pieces:
        if piece.type == kinds.USER_DEFINED and _LOOKS_LIKE_CONTROL.fullmatch(piece.piece):
            piece.type = kinds.CONTROL
    return proto.SerializeToString()


def without_control(tokenizer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """A tokenizer.json that finds no control tokens in text, and these: text to id.

    Added tokens that are special, or written like control tokens, are no longer found; others (runs of spaces and the
    like) are part of the vocabulary and stay. Those that the model's own vocabulary has are taken out; one that exists
    as added token alone gets a name that no text has, for without it the ids of all behind it would move up.
    """
    added = tokenizer.get("added_tokens") or []
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    control = {
        str(one["content"]): int(one["id"])
        for one in added
        if one.get("special") or _LOOKS_LIKE_CONTROL.fullmatch(str(one["content"]))
    }
    kept = []
    for one in added:
        name = str(one["content"])
        if name not in control:
            kept.append(one)
        elif name not in vocabulary:
            kept.append({**one, "content": f"\ufdd0{hashlib.sha256(name.encode()).hexdigest()}\ufdd0"})
    return {**tokenizer, "added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}, control


def load_tokenizer(path: Path) -> SentencePieceTokenizer | HuggingFaceTokenizer:
    """The tokenizer of a file, or of a directory with tokenizer.model or tokenizer.json.

    Raises:
        ValueError: there is none that can be read.
    """
    path = tokenizer_file(path)
    try:
        data = read_plain(path)
        if not data:  # sentencepiece takes nothing for a model that comes later
            raise ValueError("the file is empty")
        kind = HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer
        return kind(path, data)
    except Exception as error:  # tokenizers raises plain Exception for what it cannot read
        raise ValueError(
            f"--tokenizer {path}: neither a SentencePiece model nor a tokenizer.json that can be used ({error})"
        ) from None


def tokenizer_file(path: Path) -> Path:
    """The file itself, or the one that a directory holds.

    Raises:
        ValueError: it holds none.
    """
    if not path.is_dir():
        return path
    inside = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
    if not inside:
        raise ValueError(f"--tokenizer {path}: holds neither tokenizer.model nor tokenizer.json")
    return inside[0]


def _named_tokens(directory: Path) -> dict[str, str]:
    """Special tokens that the files beside a tokenizer.json name."""
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            values = parse_json(read_plain(directory / name))
            for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
                value = values.get(key)
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str):
                    named[key] = text
    return named


def _first_known(vocabulary: dict[str, int], named: str | None, usual: Sequence[str | None]) -> int | None:
    for text in (named, *usual):
        if text is not None and text in vocabulary:
            return vocabulary[text]
    return None


def _or_none(token: int) -> int | None:
    """SentencePiece says -1 for a token that a model does not have."""
    return token if token >= 0 else None
