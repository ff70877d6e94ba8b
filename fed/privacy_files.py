"""What an audit leaves in a run's folder: its result, and draws of people for comparisons."""

import io
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sparsekit.errors import RunError
from sparsekit.fed.attack_scores import Array
from sparsekit.fed.storage import write_atomically

AUDIT_FILE = "privacy.json"
FEATURES_FOLDER = "privacy"
DRAWS_FILE = "draws.npz"
LAYOUT = 1


def audit_command(run: Path) -> str:
    """Return what to type to audit a run, ready to be pasted into a shell."""
    return f"`sparsekit privacy audit {shlex.quote(str(run))}`"


def load_audit(run: Path) -> dict[str, Any]:
    """Read a run's ``privacy.json``.

    Raises
    ------
    RunError
        If there is none, or it is damaged.
    """
    path = run / AUDIT_FILE
    again = f"{audit_command(run)} writes it"
    try:
        result: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"run: {run} has not been audited (no {AUDIT_FILE}); {again}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"run: {path} is damaged ({error}); {again} anew") from None
    if not isinstance(result, dict) or result.get("layout") != LAYOUT:
        raise RunError(f"run: {path} has another layout than this release reads; {again} anew")
    if not {"attacks", "moments", "sites", "draws", "ensemble", "sparsity"} <= set(result):
        raise RunError(f"run: {path} is damaged (parts are missing); {again} anew")
    return dict(result)


def write_draws(run: Path, draws: Mapping[str, Array]) -> str:
    """Write an audit's draws, (moments, draws) by name, and return the digest of the file."""
    stream = io.BytesIO()
    # NumPy's stubs take the names for its own options.
    np.savez(stream, **draws)  # type: ignore[arg-type]
    write_atomically(run / FEATURES_FOLDER / DRAWS_FILE, stream.getvalue())
    return xxhash.xxh3_128_hexdigest(stream.getvalue())


def load_draws(run: Path, audit: Mapping[str, Any]) -> dict[str, Array]:
    """Read the draws that belong to a run's audit, (moments, draws) by name.

    Raises
    ------
    RunError
        If they are missing, damaged or of another audit.
    """
    path = run / FEATURES_FOLDER / DRAWS_FILE
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if xxhash.xxh3_128_hexdigest(data) != audit["draws"]:
        raise RunError(
            f"run: {path} is missing or does not belong to {run / AUDIT_FILE}; "
            f"{audit_command(run)} writes both anew"
        )
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
