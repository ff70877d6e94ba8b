"""Seeds that depend only on what they are for, never on the order in which they are asked."""

import xxhash


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, e.g. ``derive_seed(seed, "train", round, site)``."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1
