"""Values from a TOML file or the command line, as the types that a setting asks for."""

from typing import Any, Literal, get_args, get_origin

from sparsekit.errors import UsageError


def typed(name: str, value: Any, hint: Any) -> Any:
    """Return a setting's value as its annotated type; a whole number is a float where that fits.

    Raises
    ------
    UsageError
        If it is of another type; named values (`Literal`) are for others to check.
    """
    if get_origin(hint) is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
            return tuple(value)
        raise UsageError(f"{name}: expected a list of names, got {value!r}")
    kinds = (str,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    if value is None and type(None) in kinds:
        return None
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UsageError(f"{name}: expected a smaller number than one past 1e308") from None
    for kind in kinds:
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    expected = " or ".join(k.__name__ for k in kinds if k is not type(None))
    raise UsageError(f"{name}: expected {expected}, got {value!r}")
