"""What the tables [flare] and [flower] of a run's TOML file may say."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any, TypeVar, get_type_hints

from sparsekit.errors import MissingExtraError, UsageError
from sparsekit.fed.typed import typed

_Options = TypeVar("_Options", bound="FlareOptions | FlowerOptions")
_PACKAGES = {"flare": "nvflare", "flower": "flwr"}
_LONGEST_SECONDS = 1e6
_PATHS = ("admin", "root_certificates")


@dataclass(frozen=True, kw_only=True)
class FlareOptions:
    """Of ``--engine flare``.

    Attributes
    ----------
    mode : {"simulator", "poc", "production"}
        A process for each site of the cohort, started by NVIDIA FLARE's simulator; or a server and
        sites as FLARE's proof-of-concept services with certificates made for the run, both on
        this machine; or a provisioned FLARE that is running already.
    sites : tuple of str
        For "production": names of the sites that take part, as they call themselves.
    admin : str
        For "production": folder of the startup kit of the administrator who submits the job.
    start_seconds : float
        Seconds within which all sites must be there.
    interface : str
        Network interface whose bytes are noted in ``interface.json``; none by default.
    """

    mode: str = "simulator"
    sites: tuple[str, ...] = ()
    admin: str = ""
    start_seconds: float = 300.0
    interface: str = ""

    def __post_init__(self) -> None:
        _check(self, "flare", ("simulator", "poc"), "production", "admin")
        if self.deployed and not (Path(self.admin) / "startup").is_dir():
            raise UsageError(
                f"flare.admin: {self.admin} has no folder `startup`; expected an administrator's "
                "startup kit, as `nvflare provision` makes it"
            )

    @property
    def deployed(self) -> bool:
        """Whether the sites read scans of their own."""
        return self.mode == "production"


@dataclass(frozen=True, kw_only=True)
class FlowerOptions:
    """Of ``--engine flower``.

    Attributes
    ----------
    mode : {"local", "deployed"}
        A SuperLink and a SuperNode for each site of the cohort are started on this machine; or
        they are running already.
    tls : bool
        For "local": with a certificate and node keys made for the run.
    sites : tuple of str
        For "deployed": names of the sites that take part, as they call themselves.
    address : str
        For "deployed": host:port of the SuperLink.
    root_certificates : str
        For "deployed": file of the certificates that the SuperLink's is checked with; empty for a
        SuperLink without TLS.
    start_seconds, interface
        See `FlareOptions`.
    """

    mode: str = "local"
    tls: bool = False
    sites: tuple[str, ...] = ()
    address: str = ""
    root_certificates: str = ""
    start_seconds: float = 300.0
    interface: str = ""

    def __post_init__(self) -> None:
        _check(self, "flower", ("local",), "deployed", "address")
        if self.deployed and self.tls:
            raise UsageError("flower.tls: for mode local only; give root_certificates instead")
        for program in ("openssl", "ssh-keygen"):
            if self.tls and which(program) is None:
                raise UsageError(f"flower.tls: needs the program {program}; install it")
        if self.root_certificates and not Path(self.root_certificates).is_file():
            raise UsageError(f"flower.root_certificates: no file {self.root_certificates}")
        if self.root_certificates and not self.deployed:
            raise UsageError("flower.root_certificates: for mode deployed only; see flower.tls")

    @property
    def deployed(self) -> bool:
        """Whether the sites read scans of their own."""
        return self.mode == "deployed"


def _check(
    options: FlareOptions | FlowerOptions,
    table: str,
    local: tuple[str, ...],
    deployed: str,
    needed: str,
) -> None:
    modes = (*local, deployed)
    if options.mode not in modes:
        raise UsageError(f"{table}.mode: expected one of {', '.join(modes)}; got {options.mode!r}")
    for name in ("sites", needed):
        if options.deployed and not getattr(options, name):
            raise UsageError(f"{table}.{name}: missing; mode {deployed} needs it")
        if not options.deployed and getattr(options, name):
            raise UsageError(f"{table}.{name}: for mode {deployed} only, got mode {options.mode}")
    if len(set(options.sites)) < len(options.sites):
        raise UsageError(f"{table}.sites: expected each site once, got {list(options.sites)}")
    if not 0 < options.start_seconds <= _LONGEST_SECONDS:
        raise UsageError(
            f"{table}.start_seconds: expected a number in (0, {_LONGEST_SECONDS:g}], "
            f"got {options.start_seconds}"
        )
    if options.interface and not counters(options.interface).is_dir():
        raise UsageError(f"{table}.interface: there is no network interface {options.interface!r}")


def counters(interface: str) -> Path:
    """Return the folder of the system's counters of a network interface."""
    return Path("/sys/class/net") / interface.replace("/", "_") / "statistics"


def options_of(kind: type[_Options], table: str, given: Any) -> _Options:
    """Read a table of the TOML file.

    Raises
    ------
    UsageError
        On an unknown name, a wrong type or a combination that cannot be.
    """
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise UsageError(f"{table}: expected a table [{table}], got {given!r}")
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in hints:
            known = ", ".join(sorted(hints))
            raise UsageError(f"{table}.{name}: unknown setting; known: {known}")
        values[name] = typed(f"{table}.{name}", value, hints[name])
        if name in _PATHS and value:
            # So that the run can be resumed from any folder.
            values[name] = str(Path(value).absolute())
    return kind(**values)


def require_extra(engine: str) -> None:
    """Make sure that an engine's package is installed.

    Raises
    ------
    MissingExtraError
        If it is not; the text says how to install it.
    """
    package = _PACKAGES.get(engine)
    if package is not None and find_spec(package) is None:
        raise MissingExtraError(
            f"engine: {engine} needs the package {package}: pip install 'sparsekit3d[{engine}]'"
        )
