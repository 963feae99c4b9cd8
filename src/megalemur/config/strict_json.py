"""JSON as our files and Hugging Face's are read: no duplicate keys, no NaN or infinity. And one canonical spelling."""

import json
import math
import re
from collections import Counter
from typing import Any

_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(data: bytes) -> Any:
    """The value of a JSON document.

    Raises:
        ValueError: not UTF-8, not JSON, half a surrogate pair, a key given twice, or a number that is not finite.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
        if _ESCAPED_HALF.search(data):
            # half of a pair is no text: it could be neither written again nor be the name of a file
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def canonical_json(value: Any) -> bytes:
    """The one spelling of a value: sorted keys, no spaces, so that equal values have equal bytes.

    Raises:
        ValueError: NaN or infinity.
        TypeError: something JSON has no word for.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def readable_json(value: Any) -> bytes:
    """The same value for people: keys in the order given, indented."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} is given twice")
    return found


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond a double")
    return value
