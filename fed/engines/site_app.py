"""A site inside a framework's client program: one TOML file says where its scans are.

The file belongs to the site's administrator. What the sites must have in common, such as the seed
of the split, comes with the run's first request.
"""

import itertools
import os
import threading
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch

from sparsekit.codec import decode, encode
from sparsekit.errors import CodecError, SparsekitError, UsageError
from sparsekit.fed import messages
from sparsekit.fed.config import RunConfig, make_config
from sparsekit.fed.engines import framed
from sparsekit.fed.engines.answers import UNTOLD, account, answer
from sparsekit.fed.prepare import prepare_sites
from sparsekit.fed.site import Site
from sparsekit.fed.storage import write_atomically
from sparsekit.fed.training import Cancelled
from sparsekit.fed.typed import typed

SITE_FILE = "SPARSEKIT_SITE"
"""Environment variable: the site's TOML file, or a folder with one for each client's name."""

_INTRODUCE = "introduce"
_SHARED = ("resolution", "normalisation", "on_problem", "test_fraction", "seed")
_HELD_FILE = "held.spu"


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """What a site's file says.

    Attributes
    ----------
    cohort : str
        The site's BIDS tree or CSV. This and the folders may be relative to the file's folder.
    folder : str
        Where the site keeps predictions and its cache; they never leave it.
    site : str
        Which site of the cohort this is; may be left out where the cohort has one only.
    cache : str
        Folder of prepared scans, ``cache`` in ``folder`` by default.
    device : str
        ``"cpu"`` or ``"cuda"``.
    threads : int
        Computing threads; 0 for as many as the run says, which the same bits need.
    """

    cohort: str
    folder: str
    site: str = ""
    cache: str = ""
    device: str = "cpu"
    threads: int = 0


def find_site_file(given: str = "", *, client: str = "") -> Path:
    """Return the site's file: the one given, or else the one that the environment names.

    Raises
    ------
    UsageError
        If neither names one.
    """
    given = given or os.environ.get(SITE_FILE, "")
    if not given:
        raise UsageError(
            f"site file: missing; where this site's client is started, set {SITE_FILE}, or with "
            "Flower --node-config 'site-file=\"...\"'"
        )
    path = Path(given)
    return path / f"{client}.toml" if path.is_dir() else path


def load_site_settings(path: Path) -> SiteSettings:
    """Read a site's TOML file.

    Raises
    ------
    UsageError
        If it cannot be read or a setting is missing, unknown or of the wrong type.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"site file: cannot read {path}: {error}") from None
    known = get_type_hints(SiteSettings)
    for name in given:
        if name not in known:
            raise UsageError(f"site file: {path}: {name} is unknown; known: {', '.join(known)}")
        given[name] = typed(f"site file: {path}: {name}", given[name], known[name])
    for name in ("cohort", "folder"):
        if name not in given:
            raise UsageError(f"site file: {path}: {name} is missing")
    for name in ("cohort", "folder", "cache"):
        if given.get(name):
            given[name] = str(path.absolute().parent / given[name])
    return SiteSettings(**given)


def introduction(config: RunConfig, resolution: int, threads: int) -> bytes:
    """Return the request that a run begins with: what all sites have in common."""
    shared: dict[str, Any] = {name: getattr(config, name) for name in _SHARED}
    return messages.pack({_INTRODUCE: shared | {"resolution": resolution, "threads": threads}})


def is_introduction(request: bytes) -> bool:
    """Whether a request, which may be damaged, is a run's first."""
    try:
        return len(request) < messages.MAX_CONTROL_BYTES and _INTRODUCE in (
            messages.unpack(request).control
        )
    except CodecError:
        return False


class SiteApp:
    """Answers a framework's requests, each with one byte for its kind in front.

    Parameters
    ----------
    path : Path
        The site's file.
    keeps_model : bool
        Whether the model received last goes to the site's folder, for frameworks that start a new
        process for every message.
    """

    def __init__(self, path: Path, *, keeps_model: bool = False) -> None:
        self.settings = load_site_settings(path)
        self._keeps_model = keeps_model
        self._site: Site | None = None
        self._threads = 1
        self._numbers = itertools.count()
        self._newest = 0
        self._turn = threading.Lock()

    def answer(self, request: bytes) -> bytes:
        """Return the answer to a request; a newer one ends the work on an older one."""
        number = self._newest = next(self._numbers)
        with self._turn:
            # Of this thread, too: a framework may bring another one each time.
            torch.set_num_threads(self._threads)
            kind, data = self._answer(request, number)
        return bytes([kind]) + data

    def _answer(self, request: bytes, number: int) -> tuple[int, bytes]:
        try:
            if is_introduction(request):
                self._site = self._prepare(messages.unpack(request).control[_INTRODUCE])
                return framed.REPLY, self._site.hello()
            if self._site is None:
                return framed.FAILURE, account("dead", UNTOLD)
            reply = answer(self._site, request, lambda: self._newest != number)
            self._keep(self._site)
            return reply
        except (SparsekitError, OSError) as error:
            return framed.FAILURE, account("dead", str(error))
        except Cancelled:
            return framed.FAILURE, account("dead", "a newer request came")

    def _prepare(self, shared: Mapping[str, Any]) -> Site:
        own = self.settings
        threads = own.threads or shared.get("threads")
        if not isinstance(threads, int) or not 1 <= threads <= 1024:
            raise UsageError(f"threads: expected 1 to 1024, got {threads!r}")
        self._threads = threads
        torch.set_num_threads(threads)
        known = {name: shared[name] for name in _SHARED if name in shared}
        config = make_config(known, {"cohort": own.cohort, "device": own.device})
        folder = Path(own.folder)
        folder.mkdir(parents=True, exist_ok=True)
        found = prepare_sites(config, Path(own.cache) if own.cache else folder / "cache").sites
        people = [one for one in found if own.site in ("", one.name)]
        if len(people) != 1:
            names = ", ".join(one.name for one in found)
            raise UsageError(f"site: expected one of {names} in the site's file, got {own.site!r}")
        site = Site(people[0], folder=folder, device=own.device)
        if self._keeps_model and (folder / _HELD_FILE).exists():
            # Damaged or of another run, it costs one more message.
            try:
                site.held = decode((folder / _HELD_FILE).read_bytes())
            except CodecError:
                site.held = None
        return site

    def _keep(self, site: Site) -> None:
        if self._keeps_model and site.held is not None:
            write_atomically(Path(self.settings.folder) / _HELD_FILE, encode(site.held))
