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
    detail: str = ""
    """What sets this configuration of the kernel apart, in words."""
    tensor_cores: bool = False
    """Whether its loop has to use matrix units."""
    wide_copies: bool = False
    """Whether its loop has to be fed by asynchronous copies of 16 bytes."""

    @property
    def name(self) -> str:
        """Kernel and configuration."""
        types = [t for t in self.signature.values() if t.startswith("*")]
        detail = self.detail or " ".join(
            [*dict.fromkeys(types), *(f"{k}={v}" for k, v in self.constexprs.items())]
        )
        return f"{self.kernel.__name__} {detail}"


def build(
    kernel: Any, types: dict[str, str], constexprs: dict[str, Any], *, num_warps: int,
    num_stages: int = 3, multiples: tuple[str, ...] = (), **words: Any,
) -> Build:  # fmt: skip
    """Make a row for pointers to multiples of 16 bytes, as torch's own memory is.

    Parameters
    ----------
    kernel : JITFunction
    types : dict of str
        Triton's type of each parameter that is no constexpr, in the kernel's order.
    constexprs : dict
        Values of the others.
    num_warps, num_stages : int
    multiples : tuple of str
        Integers that are multiples of 16.
    **words
        `Build.detail` and what follows it.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    assert {name for name in names if name not in types} == constexprs.keys()
    aligned: dict[tuple[int, ...], list[list[Any]]] = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in multiples
    }
    return Build(kernel, signature, constexprs, aligned, num_warps, num_stages, **words)
