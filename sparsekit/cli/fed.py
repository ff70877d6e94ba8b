"""``sparsekit fed``: run, resume, report and compare federations."""

import dataclasses
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.cli.consoles import describe, notice_console, result_console
from sparsekit.errors import MissingExtraError, RunError, UsageError

app = typer.Typer(no_args_is_help=True, help="Train across sites; report what pruning saved.")

Out = Annotated[Path, typer.Option("--out", help="Folder of the run, to be made.")]
REPORT = "report.html"
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder of prepared scans, for all runs. [default: RUN/../cache, or as before]",
    ),
]


@app.command("run")
def run_command(
    out: Out,
    cohort: Annotated[Path | None, typer.Option(help="BIDS tree, or CSV: path, age, site.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="centralized | fedavg | fedsparsify-global | fedsparsify-local"),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Final sparsity; 0 for dense. fedavg is always dense. [default: 0.95]"),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of the federation.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Local passes per round.")] = None,
    batch: Annotated[int | None, typer.Option(help="Scans per optimizer step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    width: Annotated[float | None, typer.Option(help="Of the network; 1 is the paper's.")] = None,
    scope: Annotated[
        str | None, typer.Option(help="Pruning scope: global | layer | erk | flops")
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(help="What is pruned as one: weight | vector:V | block:VxW | filter | 2:4"),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Of the sparsity: polynomial | exponential | one-shot")
    ] = None,
    prune_end: Annotated[
        int | None, typer.Option(help="Round that reaches the final sparsity; 0 for the last.")
    ] = None,
    initial_sparsity: Annotated[
        float | None, typer.Option(help="Prune the untrained network to this; 0 for a dense start.")
    ] = None,
    regrow: Annotated[
        float | None, typer.Option(help="Share of the weights that regrowth replaces; 0 for none.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Grid to train on: 2 or 4 mm.")] = None,
    normalisation: Annotated[
        str | None, typer.Option(help="brain-zscore | volume-zscore | percentile")
    ] = None,
    on_problem: Annotated[
        str | None, typer.Option(help="refuse (default) or skip scans that cannot be used.")
    ] = None,
    values: Annotated[
        str | None, typer.Option(help="Weights that travel: lossless | bf16 | fp16 | int8 | int4")
    ] = None,
    level: Annotated[str | None, typer.Option(help="Of the codec: fast | balanced | small")] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="processes (one a site, over TCP; default) | inprocess | flare | flower"),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds in which a site's process must reply.")
    ] = None,
    quorum: Annotated[
        float | None, typer.Option(help="Fraction of the sites asked that must reply.")
    ] = None,
    participation: Annotated[
        float | None, typer.Option(help="Fraction of the sites that each round asks.")
    ] = None,
    sites_per_round: Annotated[
        int | None, typer.Option(help="The same as a number of sites; 0 for --participation.")
    ] = None,
    max_update_norm: Annotated[
        float | None, typer.Option(help="Leave out updates further than this from the model sent.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Computing threads in all.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu | cuda")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same bits.")] = None,
    keep_checkpoints: Annotated[
        int | None, typer.Option(help="Newest checkpoints to keep; 0 keeps every round's.")
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The released FedSparsify code's choices.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings; options on the line win.")
    ] = None,
    cache: Cache = None,
) -> None:
    """Train a brain-age network over the sites of a cohort and write a report."""
    from sparsekit.cli.progress import LiveWatcher
    from sparsekit.fed.allocator import keep_freed_memory
    from sparsekit.fed.config import load_config_file, make_config
    from sparsekit.fed.runner import start_run

    given: dict[str, Any] = {
        "cohort": str(cohort) if cohort is not None else None,
        "strategy": strategy,
        "sparsity": sparsity,
        "rounds": rounds,
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "width": width,
        "scope": scope,
        "granularity": granularity,
        "schedule": schedule,
        "prune_end": prune_end,
        "initial_sparsity": initial_sparsity,
        "regrow": regrow,
        "resolution": resolution,
        "normalisation": normalisation,
        "on_problem": on_problem,
        "values": values,
        "level": level,
        "engine": engine,
        "deadline": deadline,
        "quorum": quorum,
        "participation": participation,
        "sites_per_round": sites_per_round,
        "max_update_norm": max_update_norm,
        "threads": threads,
        "device": device,
        "seed": seed,
        "keep_checkpoints": keep_checkpoints,
        "paper": True if paper else None,
    }
    line = {name: value for name, value in given.items() if value is not None}
    settings = make_config(load_config_file(config) if config else {}, line)
    # Absolute, so that the run can be resumed from any folder.
    if settings.cohort:
        settings = dataclasses.replace(settings, cohort=str(Path(settings.cohort).absolute()))
    keep_freed_memory()
    with _resumable(out), LiveWatcher(settings.strategy) as watcher:
        result = start_run(settings, out, cache=cache, watcher=watcher)
    _finish(out, result)


@app.command("resume")
def resume_command(run: RunFolder, cache: Cache = None) -> None:
    """Continue an interrupted run; it ends with the same weights as an uninterrupted one."""
    from sparsekit.cli.progress import LiveWatcher
    from sparsekit.fed.allocator import keep_freed_memory
    from sparsekit.fed.runner import resume_run

    keep_freed_memory()
    with _resumable(run), LiveWatcher(run.name) as watcher:
        result = resume_run(run, cache=cache, watcher=watcher)
    _finish(run, result)


@app.command("report")
def report_command(run: RunFolder) -> None:
    """Write RUN/report.html anew, also of a run that goes on or has stopped."""
    from sparsekit.cli.privacy_tables import print_audit
    from sparsekit.cli.progress import print_progress, print_result
    from sparsekit.fed.compare import RESULT_FILE, load_result
    from sparsekit.fed.privacy_files import AUDIT_FILE, load_audit
    from sparsekit.fed.report import write_progress_report, write_report

    if (run / RESULT_FILE).exists():
        result = load_result(run)
        write_report([run], run / REPORT)
        print_result(run, result)
        if (run / AUDIT_FILE).exists():
            print_audit(run, load_audit(run))
    else:
        print_progress(run)
        write_progress_report(run, run / REPORT)
    _say_where(run / REPORT)


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Finished runs.")],
    out: Annotated[
        Path | None, typer.Option(help="Also write an HTML report of all runs to this file.")
    ] = None,
) -> None:
    """Print runs side by side; differences are paired with the first run's held-out people."""
    from sparsekit.cli.progress import print_comparison
    from sparsekit.fed.report import write_report

    if len({run.resolve() for run in runs}) < max(2, len(runs)):
        raise UsageError("compare: expected at least two runs, each once")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UsageError(f"out: expected the name of a file in an existing folder, got {out}")
    print_comparison(runs)
    if out is not None:
        write_report(runs, out)
        _say_where(out)


@contextmanager
def _resumable(run: Path) -> Iterator[None]:
    """Add to an error of the disk how to go on once it is mended."""
    try:
        yield
    except OSError as error:
        if not (run / "checkpoints").is_dir():
            raise
        raise RunError(
            f"{describe(error)}. The finished rounds are kept: when that is mended, continue with "
            f"`sparsekit fed resume {shlex.quote(str(run))}`"
        ) from error


def _finish(run: Path, result: dict[str, Any]) -> None:
    """Write a run's report, then print; a run succeeds without the extra that draws plots."""
    from sparsekit.cli.progress import print_result
    from sparsekit.fed.report import write_report

    missing = None
    try:
        write_report([run], run / REPORT)
    except MissingExtraError as error:
        missing = error
    print_result(run, result)
    if missing is None:
        _say_where(run / REPORT)
    else:
        notice_console().print(f"No report written: {missing}", markup=False)


def _say_where(report: Path) -> None:
    result_console().print(f"Report: {report}", markup=False, soft_wrap=True)
