"""A SentencePiece BPE model in the words of a tokenizer.json, which the fast engines read.

Says None where the two cannot mean the same; whether they do is still tried on the input's own text.
"""

from typing import Any

_NORMAL = 1  # sentencepiece's word for a piece that text can become
_USER_DEFINED = 4
_BPE = 2


def tokenizer_json(model: bytes) -> dict[str, Any] | None:
    """tokenizer.json without control tokens, or None for models that are no BPE or normalise the text.

    A pair is merged as early as the score of the piece that it makes is high; of several ways to the same piece, that
    of the older parts comes first (as transformers converts such models).
    """
    from sentencepiece import sentencepiece_model_pb2 as definitions

    proto = definitions.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    proto.ParseFromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    plain = (
        trainer.model_type == _BPE
        and not trainer.treat_whitespace_as_suffix
        and normalizer.escape_whitespaces
        and not normalizer.remove_extra_whitespaces
        and not normalizer.precompiled_charsmap
        and all(piece.type != _USER_DEFINED for piece in proto.pieces)
    )
    if not plain:
        return None
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if normalizer.add_dummy_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": next((piece.piece for piece in proto.pieces if piece.type == 2), None),
            "fuse_unk": True,
            "byte_fallback": trainer.byte_fallback,
            "vocab": {piece.piece: number for number, piece in enumerate(proto.pieces)},
            "merges": _merges(proto.pieces),
        },
    }


def _merges(pieces: Any) -> list[tuple[str, str]]:
    # a field of a message costs a microsecond: each is read once
    known = [(piece.piece, piece.score, piece.type) for piece in pieces]
    ids = {text: number for number, (text, _, _) in enumerate(known)}
    found = []
    for text, score, kind in known:
        if kind != _NORMAL:
            continue
        parts = [
            (ids[left], ids[right], left, right)
            for cut in range(1, len(text))
            if (left := text[:cut]) in ids and (right := text[cut:]) in ids
        ]
        found += [(-score, left, right) for _, _, left, right in sorted(parts)]
    found.sort(key=lambda one: one[0])
    return [(left, right) for _, left, right in found]
