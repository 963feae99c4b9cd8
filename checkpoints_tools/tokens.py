"""Tokenizer files beside a model: how many tokens they know, and tokens added to all of them alike.

An added token is special: text that spells it stays text wherever the tokenizer is told to leave control tokens alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from checkpoints_tools.errors import ConversionError
from megalemur.config.strict_json import parse_json, readable_json

PIECES, FAST, SETTINGS, ADDED = "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
TOKENIZER_FILES = (PIECES, FAST, SETTINGS, ADDED, "special_tokens_map.json", "chat_template.jinja")
PRESETS: Mapping[str, Sequence[str]] = {
    "lemur-chat": ("<pad>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|diff_marker|>"),
}
"""lemur-chat: what the released Lemur-70B-Chat adds to Llama 2's 32,000 tokens, in the order of its ids (its
tokenizer_config.json)."""
_CONTROL = 3  # sentencepiece's word for a piece that text never becomes


def count_tokens(files: Mapping[str, bytes]) -> int | None:
    """One more than the largest id that any of the files gives out; None where there is no tokenizer.

    Raises:
        ConversionError: a file is no tokenizer.
    """
    counts = []
    if FAST in files:
        counts.append(1 + max(_fast_ids(_json(files, FAST)).values(), default=-1))
    if PIECES in files:
        counts.append(len(_pieces(files).pieces))
    if counts and ADDED in files:
        counts.append(1 + max((_whole(i, ADDED) for i in _json(files, ADDED).values()), default=-1))
    return max(counts) if counts else None


def wanted_tokens(text: str) -> list[str]:
    """The tokens that --add-tokens names: a preset, or a list with commas.

    Raises:
        ConversionError: none, an empty one, or one twice.
    """
    if text in PRESETS:
        return list(PRESETS[text])
    tokens = text.split(",")
    if not all(tokens) or len(set(tokens)) < len(tokens):
        known = ", ".join(PRESETS)
        raise ConversionError(
            f"--add-tokens {text!r}: name tokens with commas between them, each once, or one of {known}"
        )
    return tokens


def add_tokens(files: Mapping[str, bytes], tokens: Sequence[str]) -> tuple[dict[str, bytes], dict[str, int]]:
    """The tokenizer's files with more tokens, and the ids of those.

    Raises:
        ConversionError: there is no tokenizer, or it knows one of them already.
    """
    first = count_tokens(files)
    if first is None:
        raise ConversionError(
            f"--add-tokens needs {PIECES} or {FAST} beside the weights; name the folder that has them with --tokenizer"
        )
    known = {
        **(_fast_ids(_json(files, FAST)) if FAST in files else {}),
        **(_piece_ids(files) if PIECES in files else {}),
    }
    there = [f"{token} ({known[token]})" for token in tokens if token in known]
    if there:
        raise ConversionError(f"--add-tokens: the tokenizer has {', '.join(there)} already; leave out what is there")
    ids = {token: first + number for number, token in enumerate(tokens)}
    found = dict(files)
    if FAST in files:
        found[FAST] = _with_fast(_json(files, FAST), ids)
    if PIECES in files:
        found[PIECES] = _with_pieces(files, ids)
        found[ADDED] = readable_json({**(_json(files, ADDED) if ADDED in files else {}), **ids})
    if SETTINGS in files:
        found[SETTINGS] = _with_settings(_json(files, SETTINGS), ids)
    return found, ids


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        found = parse_json(files[name])
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise ConversionError(f"{name} is no tokenizer's file: {error}") from None
    return found


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ConversionError(f"{name}: {value!r} is no token's id")
    return value


def _fast_ids(fast: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json."""
    vocabulary = (fast.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # a unigram model: pairs of piece and score
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    added = {one.get("content"): one.get("id") for one in fast.get("added_tokens") or ()}
    return {token: _whole(number, FAST) for token, number in {**vocabulary, **added}.items()}


def _pieces(files: Mapping[str, bytes]) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as definitions

    proto = definitions.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    try:
        proto.ParseFromString(files[PIECES])
    except DecodeError as error:
        raise ConversionError(f"{PIECES} is no SentencePiece model: {error}") from None
    return proto


def _piece_ids(files: Mapping[str, bytes]) -> dict[str, int]:
    return {piece.piece: number for number, piece in enumerate(_pieces(files).pieces)}


def _with_fast(fast: dict[str, Any], ids: Mapping[str, int]) -> bytes:
    fast["added_tokens"] = [
        *(fast.get("added_tokens") or ()),
        *({"id": ids[token], **_special(token)} for token in ids),
    ]
    return readable_json(fast)


def _with_pieces(files: Mapping[str, bytes], ids: Mapping[str, int]) -> bytes:
    proto = _pieces(files)
    fillers = min(ids.values()) - len(proto.pieces)
    if fillers:
        raise ConversionError(
            f"{PIECES} has {len(proto.pieces)} pieces and the tokenizer's other files know {min(ids.values())} tokens: "
            "the files do not agree; leave one of them out"
        )
    for token in ids:
        proto.pieces.add(piece=token, score=0.0, type=_CONTROL)
    data: bytes = proto.SerializeToString()
    return data


def _with_settings(settings: dict[str, Any], ids: Mapping[str, int]) -> bytes:
    """As transformers 4 and 5 read it."""
    decoder = settings.get("added_tokens_decoder") or {}
    settings["added_tokens_decoder"] = {**decoder, **{str(number): _special(token) for token, number in ids.items()}}
    settings["additional_special_tokens"] = [*(settings.get("additional_special_tokens") or ()), *ids]
    if "<pad>" in ids and settings.get("pad_token") is None:
        settings["pad_token"] = "<pad>"
    return readable_json(settings)


def _special(token: str) -> dict[str, Any]:
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
