"""What is compiled ahead of time to look at machine code: one row per kernel and configuration."""

from typing import Any, NamedTuple


class Build(NamedTuple):
    """A configuration in the form that `triton.compiler.ASTSource` takes."""

    kernel: Any
    signature: dict[str, str]
    """Type of each parameter, ``"constexpr"`` for those in `constexprs`."""
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    """By position of a parameter: what is known of its value."""
    num_warps: int
    num_stages: int


def build(
    kernel: Any, types: dict[str, str], constexprs: dict[str, Any], *, num_warps: int
) -> Build:
    """Make a row for pointers to multiples of 16 bytes, as torch's own memory is.

    Parameters
    ----------
    kernel : JITFunction
    types : dict of str
        Triton's type of each parameter that is no constexpr, in the kernel's order.
    constexprs : dict
        Values of the others.
    num_warps : int
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    assert {name for name in names if name not in types} == constexprs.keys()
    aligned: dict[tuple[int, ...], list[list[Any]]] = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
    }
    return Build(kernel, signature, constexprs, aligned, num_warps, 3)
