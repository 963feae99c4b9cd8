"""Durations as people write them: 90s, 20min, 1h30min."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, NonNegativeFloat, WithJsonSchema

_SECONDS = {"d": 86400, "h": 3600, "min": 60, "s": 1}
_PART = re.compile(r"(\d+(?:\.\d+)?)(d|h|min|s)")
_WHOLE = re.compile(r"(?:\d+(?:\.\d+)?(?:d|h|min|s))+")


def seconds_of(value: Any) -> Any:
    """Seconds of a text such as 1h30min; anything but text goes through.

    Raises:
        ValueError: no number with a unit of d, h, min or s, each at most once and the larger before the smaller.
    """
    if not isinstance(value, str):
        return value
    parts = _PART.findall(value) if _WHOLE.fullmatch(value) else []
    order = [list(_SECONDS).index(unit) for _, unit in parts]
    if not parts or order != sorted(set(order)):
        raise ValueError("a duration is written as 90s, 20min or 1h30min (d, h, min, s), or as a number of seconds")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


_SCHEMA = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": f"^{_WHOLE.pattern}$"}]}
Duration = Annotated[NonNegativeFloat, BeforeValidator(seconds_of), WithJsonSchema(_SCHEMA)]
"""Seconds, given as a number or as a text."""
