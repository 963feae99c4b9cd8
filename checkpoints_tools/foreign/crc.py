"""CRC-32 of bytes that were written in several stretches, from those of the stretches."""

from collections.abc import Sequence

from checkpoints_tools.layout import Stretch

_POLYNOMIAL = 0xEDB88320  # of zip and zlib, bits reversed
_ALL_BITS = 0xFFFFFFFF


def combined_crc(stretches: Sequence[Stretch], first: int, count: int) -> int:
    """CRC-32 of bytes [first, first + count) of a file; what no stretch covers is zero.

    Args:
        stretches: of the file, without overlaps; those outside are passed over.
        first: first byte.
        count: bytes.
    """
    crc, at = 0, first
    for stretch in sorted(stretches):
        if first <= stretch.offset < first + count:
            crc = _joined(_with_zeros(crc, stretch.offset - at), stretch.crc, stretch.length)
            at = stretch.offset + stretch.length
    assert at <= first + count, "a stretch reaches beyond the record"
    return _with_zeros(crc, first + count - at)


def _with_zeros(crc: int, count: int) -> int:
    """Of A and so many zeros; a CRC is the complement of the register that the bytes pass through."""
    return _times(_power(8 * count), crc ^ _ALL_BITS) ^ _ALL_BITS


def _joined(one: int, other: int, length: int) -> int:
    """Of A + B from those of A and B: CRC(A) times x^(8 length of B), plus CRC(B) (zlib, crc32_combine)."""
    return _times(_power(8 * length), one) ^ other


def _times(a: int, b: int) -> int:
    """Product of two polynomials modulo the CRC's, bits reversed."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _power(exponent: int) -> int:
    """x to the power, modulo the CRC's polynomial."""
    result, square = 1 << 31, 1 << 30  # 1 and x
    while exponent:
        if exponent & 1:
            result = _times(square, result)
        square = _times(square, square)
        exponent >>= 1
    return result
