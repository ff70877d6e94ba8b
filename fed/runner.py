"""The server loop: from a configuration to a finished run folder, resumable after any round."""

import fcntl
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sparsekit._version import __version__
from sparsekit.errors import CohortError, RunError, SparsekitError, SparsekitWarning, UsageError
from sparsekit.fed import checkpoint, messages
from sparsekit.fed.algorithm import (
    encode_whole,
    initial_state,
)
from sparsekit.fed.checkpoint import Checkpoint, resume_command
from sparsekit.fed.config import RunConfig, dump_config, load_config_file, make_config
from sparsekit.fed.engines.base import Engine
from sparsekit.fed.engines.inprocess import InProcessEngine
from sparsekit.fed.engines.opening import open_relayed
from sparsekit.fed.engines.processes import ProcessesEngine, SiteProcess
from sparsekit.fed.ledger import OUTCOME_OK, Ledger, message_row
from sparsekit.fed.measures import (
    evaluation,
    history_entry,
    mask_bits_per_weight,
    weight_change,
)
from sparsekit.fed.participation import drawn_sites
from sparsekit.fed.plan import Hello, from_control
from sparsekit.fed.prepare import Prepared, pool_sites, prepare_elsewhere, prepare_sites
from sparsekit.fed.result import summarize
from sparsekit.fed.rounds import QuorumError, play_round
from sparsekit.fed.site import Site
from sparsekit.fed.storage import remove_leftovers, write_atomically, write_json
from sparsekit.fed.watching import Logged, open_log
from sparsekit.fed.watching import Silent as Silent
from sparsekit.fed.watching import Watcher as Watcher

CONFIG_FILE = "config.toml"
LEDGER_FILE = "ledger.jsonl"
LOCK_FILE = ".lock"
CONNECTIONS_FILE = "connections.json"
LOG_FILE = "run.log"
MODEL_FILE = "model.spu"
RESULT_FILE = "result.json"


class InterruptedRunError(SparsekitError, KeyboardInterrupt):
    """The user stopped the run; what was finished is on disk."""


def start_run(
    config: RunConfig, run: Path, *, cache: Path | None = None, watcher: Watcher | None = None
) -> dict[str, Any]:
    """Play a whole run in a new folder.

    Parameters
    ----------
    config : RunConfig
        Its settings.
    run : Path
        Folder to make; it must not hold anything yet.
    cache : Path, optional
        Folder for the caches of scans, shared between runs; by default that of the settings, or
        ``cache`` beside ``run``.
    watcher : Watcher, optional
        Told of the progress.

    Returns
    -------
    dict
        What ``result.json`` holds.

    Raises
    ------
    UsageError
        If ``run`` is not empty.
    CohortError, RunError
        See the text.
    """
    if run.exists() and not _is_unused(run):
        raise UsageError(
            f"out: {run} already holds something; choose another folder, or continue it with "
            f"{resume_command(run)}"
        )
    if not config.deployed and not Path(config.cohort).exists():
        raise UsageError(f"cohort: no such file or folder: {config.cohort}")
    if cache is not None or config.cache:
        # Absolute, for it is written down, and the run may be resumed from any folder.
        config = replace(config, cache=str((cache or Path(config.cache)).absolute()))
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / CONFIG_FILE, dump_config(config).encode())
    try:
        return _play(config, run, _cache_of(config, run), watcher or Silent())
    except (CohortError, UsageError):
        # Nothing has been trained: once cohort or command are mended, the folder can be used again.
        if not checkpoint.saved_rounds(run):
            for name in (CONFIG_FILE, LOCK_FILE, LOG_FILE):
                (run / name).unlink(missing_ok=True)
            with suppress(OSError):
                run.rmdir()
        raise


def _is_unused(run: Path) -> bool:
    """Whether a folder holds at most what a server leaves that is killed as it begins."""
    pattern = f".{CONFIG_FILE}.*.tmp"
    return run.is_dir() and all(path.match(pattern) for path in run.iterdir())


def _cache_of(config: RunConfig, run: Path) -> Path:
    """Return the cache that the settings name, or that beside the run, also of a run in "."."""
    return Path(config.cache) if config.cache else run.resolve().parent / "cache"


def resume_run(
    run: Path, *, cache: Path | None = None, watcher: Watcher | None = None
) -> dict[str, Any]:
    """Continue a run from its newest checkpoint; the weights end as if it had never stopped.

    Raises
    ------
    UsageError
        If ``run`` is not the folder of a run.
    """
    if not (run / CONFIG_FILE).is_file():
        raise UsageError(f"run: {run} has no {CONFIG_FILE}; expected the --out of `fed run`")
    config = make_config(load_config_file(run / CONFIG_FILE))
    return _play(config, run, cache or _cache_of(config, run), watcher or Silent())


def site_folder(run: Path, site: str) -> Path:
    """Return where a site keeps its own results; any name makes a valid folder."""
    return run / "sites" / quote(site, safe="")


@contextmanager
def _exclusive(run: Path) -> Iterator[None]:
    """Hold the run's lock, so that no second process writes into the same folder."""
    with (run / LOCK_FILE).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # `fed report` looks whether it is held, for an instant.
            time.sleep(0.1)
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"run: another process is working on {run}; wait for it or stop it"
                ) from None
        yield


def is_running(run: Path) -> bool:
    """Whether a process works on the run at this moment."""
    try:
        with (run / LOCK_FILE).open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _play(config: RunConfig, run: Path, cache: Path, watcher: Watcher) -> dict[str, Any]:
    try:
        with _exclusive(run), open_log(run / LOG_FILE) as log:
            try:
                return _play_logged(config, run, cache, Logged(log, watcher), log)
            except KeyboardInterrupt:
                log.warning("interrupted; continue with %s", resume_command(run))
                raise
            except Exception as error:
                log.error("stopped: %s", error)
                raise
    except KeyboardInterrupt:
        raise InterruptedRunError(f"interrupted; continue with {resume_command(run)}") from None


def _play_logged(
    config: RunConfig, run: Path, cache: Path, watcher: Logged, log: logging.Logger
) -> dict[str, Any]:
    text = "sparsekit %s, process %d, strategy %s, engine %s"
    log.info(text, __version__, os.getpid(), config.strategy, config.engine)
    remove_leftovers(run)
    if config.deployed:
        prepared = prepare_elsewhere(config)
    else:
        prepared = prepare_sites(config, cache, watcher.preparing)
    for problem in prepared.skipped:
        watcher.notice(f"skipped {problem.path}: {problem.detail}")
    if not config.deployed:
        drawn_sites(config, 1, [site.name for site in prepared.sites])
    engine = _engine(config, run, cache, prepared, log)
    try:
        final = _loop(config, run, engine, prepared.resolution, watcher)
    finally:
        engine.close()
        if isinstance(engine, ProcessesEngine):
            _keep_connections(run / CONNECTIONS_FILE, engine.closed)
    result = summarize(config, run, final, prepared)
    write_json(run / RESULT_FILE, result)
    log.info("finished: test MAE %.3f years", result["accuracy"]["test_mae"])
    return result


def _keep_connections(path: Path, closed: list[dict[str, Any]]) -> None:
    """Add to the account of a run that was interrupted and goes on."""
    before: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        before = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, [*before, *closed])


def _engine(
    config: RunConfig, run: Path, cache: Path, prepared: Prepared, log: logging.Logger
) -> Engine:
    sites = prepared.sites
    pooled = config.strategy == "centralized"
    if config.engine in ("flare", "flower") and not pooled:
        folders = [site_folder(run, site.name) for site in sites]
        return open_relayed(config, run, cache, sites, folders, prepared.resolution)
    if config.engine == "processes" and not pooled:
        return ProcessesEngine(
            [SiteProcess(s.name, len(s.train), site_folder(run, s.name)) for s in sites],
            run=run,
            cache=cache,
            threads=config.threads,
            deadline=config.deadline,
            log=log,
        )
    return InProcessEngine(
        [
            Site(people, folder=site_folder(run, people.name), device=config.device)
            for people in ([pool_sites(sites)] if pooled else sites)
        ],
        threads=config.threads,
        travels=not pooled,
    )


def _loop(
    config: RunConfig, run: Path, engine: Engine, resolution: int, watcher: Watcher
) -> Checkpoint:
    """Play the rounds that are still missing and return the finished state."""
    ledger = Ledger(run / LEDGER_FILE)
    raw_hellos = engine.hello()
    hellos = {
        site: from_control(Hello, messages.unpack(raw_hellos[site]).control)
        for site in sorted(raw_hellos)
    }
    _check_hellos(hellos)
    saved = checkpoint.load_newest(run)
    if saved is None:
        saved = _first_checkpoint(config, hellos, raw_hellos, resolution, ledger, engine)
        checkpoint.save(run, saved, keep=config.keep_checkpoints)
    else:
        _check_contents(saved.contents, hellos)
        ledger.truncate(saved.ledger_bytes)
    server, history, seconds = saved.server, list(saved.history), saved.seconds
    holding: frozenset[str] = frozenset()

    while True:
        number = server.round + 1
        asked = {site: hellos[site] for site in drawn_sites(config, number, hellos)}
        watcher.round_started(number, config.rounds, list(asked))
        start = time.perf_counter()
        try:
            with _warnings_as_notices(watcher):
                outcome = play_round(server, config, engine, asked, watcher.site_answered, holding)
        except QuorumError as error:
            ledger.append(error.rows)
            text = f"{error} Mend the sites and continue with {resume_command(run)}."
            raise QuorumError(text, error.rows) from None
        for site, failure in outcome.failures.items():
            watcher.notice(f"round {number}: {site} is out: {failure.outcome} ({failure.detail})")
        holding = frozenset(outcome.answers)
        # The reports tell how good the model was that the sites received.
        history[-1] = history[-1] | evaluation(outcome.answers)
        if history[-1]["test_n"]:
            watcher.round_finished(history[-1])
        ledger.append(outcome.rows)
        seconds += time.perf_counter() - start
        entry = history_entry(outcome.state, number, outcome.rows, seconds)
        entry["weight_change"] = weight_change(server.weights, outcome.state)
        entry["mask_bits_per_weight"] = mask_bits_per_weight(outcome.order)
        if number > config.rounds:
            history[-1] |= {"final_" + k: entry[k] for k in ("payload_down", "transport_down")}
            # As the sites received it, for that is what they evaluated.
            sent = outcome.order.sent
            model = encode_whole(sent, replace(outcome.order.plan, round=server.round))
            write_atomically(run / MODEL_FILE, model)
            return Checkpoint(server, history, ledger.size_bytes, seconds, saved.contents)
        losses = [report.train_loss for report in outcome.answers.values()]
        known = [loss for loss in losses if loss is not None]
        entry["train_loss"] = sum(known) / len(known) if known else None
        entry["sites_asked"], entry["sites_in"] = len(asked), len(outcome.answers)
        server = outcome.state
        history.append(entry)
        # Else its messages would be held while the next ones are made.
        del outcome
        checkpoint.save(
            run,
            Checkpoint(server, history, ledger.size_bytes, seconds, saved.contents),
            keep=config.keep_checkpoints,
        )


@contextmanager
def _warnings_as_notices(watcher: Watcher) -> Iterator[None]:
    """Show sparsekit's own warnings, such as an emptied layer, once a round beside the progress."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SparsekitWarning)
        yield
    for text in dict.fromkeys(str(w.message) for w in caught if _is_ours(w)):
        watcher.notice(text)
    for other in (w for w in caught if not _is_ours(w)):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)


def _is_ours(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, SparsekitWarning)


def _check_hellos(hellos: Mapping[str, Hello]) -> None:
    kinds = {hello.preprocessing_id for hello in hellos.values()}
    if len(kinds) > 1:
        raise RunError(
            f"sites: they prepared their scans in different ways: {', '.join(sorted(kinds))}. "
            "Use one resolution and one normalisation everywhere."
        )


def _check_contents(saved: Mapping[str, str], hellos: Mapping[str, Hello]) -> None:
    now = {site: hello.content for site, hello in hellos.items()}
    if now != saved:
        changed = sorted(site for site in {*now, *saved} if now.get(site) != saved.get(site))
        raise RunError(
            f"cohort: the people, ages or scans of {', '.join(changed)} are not those that the run "
            "began with. Restore them, or start a new run."
        )


def _first_checkpoint(
    config: RunConfig,
    hellos: Mapping[str, Hello],
    raw_hellos: Mapping[str, bytes],
    resolution: int,
    ledger: Ledger,
    engine: Engine,
) -> Checkpoint:
    ledger.truncate(0)
    rows = [
        message_row(
            round_number=0,
            client=site,
            direction="up",
            outcome=OUTCOME_OK,
            dense_equivalent_bytes=0,
            message_bytes=len(raw_hellos[site]),
            payload_bytes=0,
            travels=engine.travels,
            frame_bytes=engine.frame_bytes,
        )
        for site in hellos
    ]
    ledger.append(rows)
    mean_age = config.mean_age
    if mean_age is None:
        people = sum(hello.n_train for hello in hellos.values())
        mean_age = sum(hello.age_sum for hello in hellos.values()) / people
    first_voxel, in_shape = config.box(resolution)
    server = initial_state(config, in_shape=in_shape, mean_age=mean_age, first_voxel=first_voxel)
    history = [history_entry(server, 0, rows, 0.0)]
    contents = {site: hello.content for site, hello in hellos.items()}
    return Checkpoint(server, history, ledger.size_bytes, 0.0, contents)
