"""The checksum of bytes that were checked in parts."""

from __future__ import annotations

_POLYNOMIAL = 0xEDB88320  # of zlib's crc32, its lowest power in the highest bit
_Matrix = tuple[int, ...]  # of 32 x 32 bits: what each bit of a checksum becomes


def _times(matrix: _Matrix, vector: int) -> int:
    total = 0
    for column in matrix:
        if vector & 1:
            total ^= column
        vector >>= 1
    return total


def joined_crc32(first: int, second: int, length: int) -> int:
    """The crc32 of two runs of bytes, one behind the other.

    A checksum is a remainder modulo a polynomial over two elements, so each byte of value zero behind the first run
    applies one linear map to it; the map of `length` of them is found by squaring.

    Args:
        first: crc32 of the first run.
        second: crc32 of the second run.
        length: Bytes of the second run.

    >>> import zlib
    >>> joined_crc32(zlib.crc32(b"align"), zlib.crc32(b"ment"), 4) == zlib.crc32(b"alignment")
    True
    """
    shift: _Matrix = (_POLYNOMIAL, *(1 << bit for bit in range(31)))  # one bit of value zero
    for _ in range(3):
        shift = tuple(_times(shift, column) for column in shift)  # two, four, eight: one byte
    while length:
        if length & 1:
            first = _times(shift, first)
        shift = tuple(_times(shift, column) for column in shift)
        length >>= 1
    return first ^ second
