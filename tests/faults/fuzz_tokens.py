"""Ids of the fast engine against sentencepiece's: fuzzed strings, and the text of this machine. Run by `make fuzz`.

python -m tests.faults.fuzz_tokens --strings 50000
"""

import argparse
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data_prep.engine import fast_engine, first_difference
from data_prep.tokenizer import load_tokenizer
from tests.support.datasets import MODEL

_PIECES = (
    *("def ", "return", "self.", "lemur", "    ", "  ", " ", "\t", "\n", "\r\n", "\x00", "\u2581", "\u00a0", "\u200d"),
    *("é", "e\u0301", "ﬁ", "你好", "こんにちは", "नमस्ते", "🙂", "👩\u200d👩\u200d👧", "\U0010ffff", "ß", "İ"),
    *("<s>", "</s>", "<unk>", "<0x0A>", "<|im_start|>", "<|im_end|>", "[INST]", "<", ">", "s>", "</", "<0x"),
    *("0", "1234567890", "0x7f", "1e-5", "==", "!=", "->", "()", "\\n", "'", '"', "```"),
)


_ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".json", ".c", ".h", ".cpp", ".js", ".html", ".css")


def strings(count: int, seed: int) -> Iterator[str]:
    """Mixtures of pieces on which tokenizers differ, and of any code points but surrogates."""
    chance = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(chance.randrange(1, 25)):
            if chance.random() < 0.75:
                parts.append(chance.choice(_PIECES))
            else:
                code = chance.randrange(chance.choice((0x80, 0x800, 0xD800, 0x110000)))
                parts.append("?" if 0xD800 <= code < 0xE000 else chr(code))
        yield "".join(parts)


def files() -> Iterator[str]:
    """Every text file of Python's library and the installed packages."""
    for folder in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in _ENDINGS:
                try:
                    yield path.read_text("utf-8")
                except (UnicodeDecodeError, OSError):
                    continue


def compare(texts: Iterator[str]) -> tuple[int, int]:
    """(texts, bytes) that were compared.

    Raises:
        AssertionError: the first text whose ids differ.
    """
    fast, reference = fast_engine(MODEL), load_tokenizer(MODEL)
    assert fast is not None
    count = size = 0
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        count, size = count + 1, size + len(text.encode())
        if len(batch) == 64:
            _refuse_difference(fast, reference, batch)
            batch = []
    if batch:
        _refuse_difference(fast, reference, batch)
    return count, size


def _refuse_difference(fast, reference, batch: list[str]) -> None:
    different = first_difference(fast, reference, batch)
    assert different is None, f"other ids for {batch[different or 0][:300]!r}"


def main() -> None:
    """Parse, try, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strings", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for what, texts in (("fuzzed strings", strings(args.strings, args.seed)), ("files", files())):
        count, size = compare(texts)
        sys.stdout.write(f"{count:,} {what}, {size / 1e6:.1f} MB: equal ids\n")


if __name__ == "__main__":
    main()
