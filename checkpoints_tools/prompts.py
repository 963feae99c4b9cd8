"""What checkpoints are run on to compare their logits: texts as the checkpoint's own tokenizer cuts them, or, where it
has none, fixed pseudo-random ids."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoints_tools.errors import RequestError
from megalemur.config.plain_files import read_plain

SEPARATOR = "---"
"""A line of its own between two prompts of a file."""
MAX_TOKENS = 2048
"""Of all prompts together: what the forward pass holds grows with it."""

_RANDOM_PROMPTS, _RANDOM_TOKENS = 4, 64
_MAX_FILE_BYTES = 16 << 20

TEXTS = (
    "The ring-tailed lemur lives in the south of Madagascar. It spends a good part of the morning sitting upright in "
    "the sun, arms stretched out, until it is warm enough to look for leaves and fruit. Unlike most of its relatives "
    "it walks long distances on the ground, with its tail held high so that the troop can follow",
    "def moving_average(values: list[float], window: int) -> list[float]:\n"
    '    """Means of every `window` neighbours."""\n'
    "    if window < 1:\n"
    '        raise ValueError(f"window is {window}; at least 1 is needed")\n'
    "    total, means = 0.0, []\n"
    "    for index, value in enumerate(values):\n"
    "        total += value\n"
    "        if index >= window:\n"
    "            total -= values[index - window]\n"
    "        if index + 1 >= window:\n",
    "#include <stdio.h>\n\n"
    "/* Prints the lines of a file that are longer than a limit. */\n"
    "int main(int argc, char **argv) {\n"
    "    char line[4096];\n"
    '    FILE *file = argc > 1 ? fopen(argv[1], "r") : stdin;\n'
    "    while (file != NULL && fgets(line, sizeof line, file)) {\n",
    "SELECT c.name, COUNT(*) AS orders, SUM(o.total) AS spent\nFROM customers c\n"
    "JOIN orders o ON o.customer_id = c.id\nWHERE o.placed_at >= '2021-03-01'\n"
    "GROUP BY c.name\nHAVING COUNT(*) > 3\nORDER BY",
    "Frage: Ein Zug fährt um 9:40 Uhr ab und braucht für 210 km zweieinhalb Stunden. Wann kommt er an, und wie schnell "
    "fährt er im Mittel?\nAntwort: Er kommt um",
    "Question: A baker sells 48 rolls in the morning and half as many in the afternoon. Each roll costs $0.75. How "
    "much does she earn?\nAnswer: In the afternoon she sells 48 / 2 =",
)
"""Prose, code of three languages, and two small sums; no end of a text, so that the last token has a next one."""


@dataclass(frozen=True)
class Encoded:
    """Prompts as a model gets them."""

    ids: Sequence[Sequence[int]]
    origin: str
    """Where they come from, for people."""

    @property
    def tokens(self) -> int:
        """Of all prompts together."""
        return sum(map(len, self.ids))


def read_prompts(path: Path) -> list[str]:
    """The texts of a file: UTF-8, between two of them a line that holds nothing but `---`.

    Raises:
        RequestError: the file cannot be read, or holds no text.
    """
    try:
        text = read_plain(path, _MAX_FILE_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as prompts: {error}") from None
    texts: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if line.strip() == SEPARATOR:
            texts.append([])
        else:
            texts[-1].append(line)
    found = [text for lines in texts if (text := "".join(lines).strip("\n"))]
    if not found:
        raise RequestError(f"{path} holds no prompt; write texts, with a line {SEPARATOR} between two of them")
    return found


def encode(
    files: Sequence[Mapping[str, bytes]], texts: Sequence[str] | None, *, vocab_size: int, limit: int
) -> Encoded:
    """Prompts for two checkpoints.

    Args:
        files: small files of each; the first tokenizer that can be read is taken.
        texts: None: the ones of this module, or pseudo-random ids where there is no tokenizer.
        vocab_size: ids that all models have.
        limit: tokens of a prompt; longer ones are cut.

    Raises:
        RequestError: there are texts and no tokenizer, an id that no model has, or more than MAX_TOKENS in all.
    """
    tokenizer, problems = None, list[str]()
    for found in files:
        tokenizer = tokenizer or _tokenizer(found, problems)
    if tokenizer is None:
        why = f" ({'; '.join(problems)})" if problems else ""
        if texts is not None:
            raise RequestError(f"neither checkpoint has a tokenizer for the prompts{why}; copy the model's there")
        ids = _random_ids(vocab_size, min(limit, _RANDOM_TOKENS))
        return Encoded(ids, f"pseudo-random ids: neither checkpoint has a tokenizer that can be read{why}")
    name, cut = tokenizer
    chosen = TEXTS if texts is None else texts
    encoded = [cut(text)[:limit] for text in chosen]
    beyond = max((max(ids) for ids in encoded if ids), default=0)
    if beyond >= vocab_size:
        raise RequestError(f"{name} gives the id {beyond}, and the models know 0 to {vocab_size - 1}: it is another's")
    result = Encoded(encoded, f"{len(encoded)} texts, cut by {name}")
    if result.tokens > MAX_TOKENS:
        raise RequestError(f"the prompts have {result.tokens:,} tokens, {MAX_TOKENS:,} are possible; give fewer")
    return result


Cut = Callable[[str], list[int]]


def _tokenizer(files: Mapping[str, bytes], problems: list[str]) -> tuple[str, Cut] | None:
    kinds: dict[str, Callable[[bytes], Cut]] = {"tokenizer.json": _from_json, "tokenizer.model": _from_sentencepiece}
    for name, kind in kinds.items():
        if files.get(name):
            try:
                return name, kind(files[name])
            except Exception as error:  # tokenizers raises nothing more special
                lines = str(error).splitlines() or [type(error).__name__]
                problems.append(f"{name}: {lines[0]}")
    return None


def _from_json(data: bytes) -> Cut:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(data)
    return lambda text: list(tokenizer.encode(text).ids)


def _from_sentencepiece(data: bytes) -> Cut:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=data)
    start = [model.bos_id()] if model.bos_id() >= 0 else []
    return lambda text: start + list(model.encode(text))


def _random_ids(vocab_size: int, tokens: int) -> list[list[int]]:
    """The same in every version of Python."""
    draw = random.Random(20_000)
    return [[int(draw.random() * vocab_size) for _ in range(tokens)] for _ in range(_RANDOM_PROMPTS)]
