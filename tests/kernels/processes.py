"""Running a part of a test in another process."""

import os
import select
import signal
from collections.abc import Callable

import torch

from sparsekit.ops import topk_mask


def in_forked_child(work: Callable[[], bytes]) -> bytes:
    """What ``work`` returns in a child of this process; nothing if it raises there."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, work())
        finally:
            os._exit(0)
    os.close(write)
    try:
        with os.fdopen(read, "rb") as pipe:
            assert select.select([pipe], [], [], 30)[0], "the child does not answer"
            return pipe.read()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def select_in_child(_: int) -> list[int]:
    torch.set_num_threads(2)
    values = torch.arange(1 << 18, dtype=torch.float32) % 1000
    (mask,) = topk_mask([values], 300)
    return torch.nonzero(mask).flatten().tolist()
