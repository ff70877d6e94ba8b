"""Numbers of 7 bits a byte, the lowest first; all bytes but the last have their high bit set."""

from sparsekit.errors import FormatError

_MOST_BYTES = 9


def pack(number: int) -> bytes:
    """Bytes of a number below 2**63."""
    groups = []
    while number >= 0x80:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def read(data: memoryview, at: int, where: str) -> tuple[int, int]:
    """Number at a place, and where the next one starts; `where` is for errors."""
    number = 0
    for index, byte in enumerate(data[at : at + _MOST_BYTES]):
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            if index and not byte:
                raise FormatError(f"a number of {where} is longer than needed")
            return number, at + index + 1
    raise FormatError(f"a number of {where} has no end")
