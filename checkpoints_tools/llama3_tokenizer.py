"""Llama 3's tokenizer.model, which is no SentencePiece model: tokens in base64 and their ranks, as tiktoken reads them.
Made into the tokenizer.json that Hugging Face's libraries read.

Facts, from Meta's own tokenizer: the pattern that cuts text before pairs are merged, and 256 special tokens behind the
others, of which release 3.1 gave some of the reserved ones names. A pair is merged by the rank of the token it makes.
"""

import base64
import binascii
import re
from pathlib import Path

from checkpoints_tools.errors import UnfitSource
from megalemur.config.strict_json import readable_json

SPECIAL_TOKENS = 256
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,7})")
_MAX_BYTES, _MAX_TOKEN_BYTES = 64 << 20, 256
_BEGIN, _END = "<|begin_of_text|>", "<|end_of_text|>"
# id behind the last ordinary token: its name; all others are reserved
_NAMES = {0: _BEGIN, 1: _END, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
_NAMES_OF_3_1 = {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}


def recognises(data: bytes) -> bool:
    """Whether the file begins as tiktoken's do."""
    return _LINE.fullmatch(data[:1024].partition(b"\n")[0].rstrip(b"\r")) is not None


def hugging_face_files(data: bytes, file: Path, *, release_3_1: bool, rows: int, context: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json.

    Args:
        data: the file's bytes.
        file: for messages.
        release_3_1: whether the reserved tokens have the names of 3.1 and later.
        rows: of the embedding: so many tokens there must be, the special ones included.
        context: tokens that the model takes.

    Raises:
        UnfitSource: it is no such file, or one of another vocabulary.
    """
    ranks = _ranks(data, file)
    if len(ranks) + SPECIAL_TOKENS != rows:
        raise UnfitSource(
            f"{file}: has {len(ranks)} tokens, and with {SPECIAL_TOKENS} special ones that makes "
            f"{len(ranks) + SPECIAL_TOKENS}; the embedding has {rows} rows"
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BEGIN,
        "eos_token": _END,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
    }
    return {
        "tokenizer.json": _tokenizer(ranks, _special(release_3_1=release_3_1)),
        "tokenizer_config.json": readable_json(settings),
    }


def _special(*, release_3_1: bool) -> list[str]:
    names = {**_NAMES, **(_NAMES_OF_3_1 if release_3_1 else {})}
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(SPECIAL_TOKENS))
    return [names[place] if place in names else next(reserved) for place in range(SPECIAL_TOKENS)]


def _ranks(data: bytes, file: Path) -> dict[bytes, int]:
    """Token to rank, in the order of the ranks, which count from 0."""
    if len(data) > _MAX_BYTES:
        raise UnfitSource(f"{file}: has {len(data)} bytes, and no tokenizer more than {_MAX_BYTES}")
    found: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines()):
        match = _LINE.fullmatch(line)
        try:
            token = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            token = b""
        if match is None or not 0 < len(token) <= _MAX_TOKEN_BYTES or token in found or int(match[2]) != number:
            raise UnfitSource(f"{file}: line {number + 1} is no token and its rank {number}: {line[:80]!r}")
        found[token] = number
    missing = [byte for byte in range(256) if bytes([byte]) not in found]
    if missing:
        raise UnfitSource(f"{file}: has no token for byte {missing[0]}")
    return found


def _tokenizer(ranks: dict[bytes, int], special: list[str]) -> bytes:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = _letters()
    spelled = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    merges = []
    for token in ranks:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += [(spelled[one], spelled[other]) for one, other in sorted(known, key=lambda cut: ranks[cut[0]])]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    # text that is a token as a whole needs no merges that lead to it
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    begin = processors.TemplateProcessing(
        single=f"{_BEGIN} $A", pair=f"{_BEGIN} $A {_BEGIN}:1 $B:1", special_tokens=[(_BEGIN, len(ranks))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return tokenizer.to_str(pretty=True).encode()


def _letters() -> list[str]:
    """How byte-level tokenizers spell each byte: printable ones as themselves, the others from code point 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
