"""Sizes as people write them."""

import re

from checkpoints_tools.errors import ConversionError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str, option: str) -> int:
    """Bytes of `5GB`, `500 MiB` or `1000000`; decimal units as Hugging Face has them.

    Raises:
        ConversionError: names the option.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper(), re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise ConversionError(f"{option} {text!r} is no size; write 5GB, 500MB or 2GiB")
    return size
