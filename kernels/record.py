"""Job records whose fields are all numbers."""

import numpy as np


def record(*names: str) -> np.dtype[np.void]:
    """Dtype of a job with these fields, all int64; addresses count bytes."""
    fields: list[tuple[str, type]] = [("next", np.int64), ("parts", np.int64)]
    return np.dtype([*fields, *((name, np.int64) for name in names)], align=True)
