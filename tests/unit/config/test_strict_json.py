"""JSON without its surprises."""

import pytest

from megalemur.config.strict_json import canonical_json, parse_json


@pytest.mark.parametrize(
    "data", [b'{"a": 1, "a": 2}', b"[NaN]", b"[-Infinity]", b"[1e999]", b"\xff", b"{", b"[" * 100000]
)
def test_loose_json_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(data)


def test_equal_values_have_equal_bytes_and_come_back() -> None:
    value = {"b": [1, 0.1, None, "ä"], "a": {"y": True, "x": -3}}
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))
    assert parse_json(canonical_json(value)) == value


def test_what_is_not_finite_is_not_written() -> None:
    with pytest.raises(ValueError):
        canonical_json({"loss": float("nan")})
