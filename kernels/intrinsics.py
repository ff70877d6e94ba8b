"""Numba's decorator for functions that write LLVM code, with a type that checkers understand."""

from collections.abc import Callable
from typing import Any

from numba import extending


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make an intrinsic of ``function(typing_context, *types) -> (signature, generate)``.

    Kernels call the result without the typing context. Constants of the kernel arrive as literal
    types, so that they can decide the machine code.
    """
    made: Callable[..., Any] = extending.intrinsic(prefer_literal=True)(function)
    return made
