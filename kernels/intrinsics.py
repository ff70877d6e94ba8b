"""Numba's decorators for what kernels call, with types that checkers understand."""

from collections.abc import Callable, Collection
from typing import Any

from numba import extending, njit


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make an intrinsic of ``function(typing_context, *types) -> (signature, generate)``.

    Kernels call the result without the typing context. Constants of the kernel arrive as literal
    types, so that they can decide the machine code.
    """
    made: Callable[..., Any] = extending.intrinsic(prefer_literal=True)(function)
    return made


def inlined(fastmath: Collection[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function into every kernel that calls it.

    As a function of its own it would have its own machine code, and the process that compiles a
    kernel would call that one, and those that load the kernel the copy that comes with it: two
    codes may add numbers up in two orders.
    """
    made: Callable[..., Any] = njit(fastmath=set(fastmath) or False, forceinline=True)
    return made
