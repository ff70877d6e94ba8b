"""Keeping freed memory in the process, for programs that train and do nothing else."""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory() -> bool:
    """Tell the C library to reuse freed memory instead of handing it back to the kernel.

    A training step frees and takes tensors of several megabytes at once. By default glibc unmaps
    them, and the kernel clears every page again on the next step. The setting holds for the whole
    process, so the command line calls this and a library function must not.

    Returns
    -------
    bool
        Whether the C library took the setting; others than glibc have none.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    )
