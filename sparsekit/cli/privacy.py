"""``sparsekit privacy``: does a model tell who it was trained on?"""

from pathlib import Path
from typing import Annotated

import typer

from sparsekit.cli.consoles import result_console
from sparsekit.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="Ask a run's models who they were trained on.")

ATTACK_HELP = "error | prediction | gradient-magnitudes | last-layers | all; repeat for several."


@app.command("audit")
def audit_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    attack: Annotated[
        list[str] | None, typer.Option(help=f"{ATTACK_HELP} [default: each of them]")
    ] = None,
    moments: Annotated[
        int, typer.Option(help="Models along the training to attack, the last one included.")
    ] = 6,
    ensemble: Annotated[int, typer.Option(help="Rounds whose models an attack sees together.")] = 5,
    shuffles: Annotated[
        int, typer.Option(help="Plays with shuffled membership at the last moment.")
    ] = 19,
    threads: Annotated[
        int | None, typer.Option(help="Computing threads. [default: the run's]")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of prepared scans. [default: RUN/../cache]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this file.")] = None,
) -> None:
    """Let every site of a run attack every other one, and write RUN/privacy.json.

    The run must have kept its models: --keep-checkpoints 5, or 0 for all rounds. What is read off
    the models is kept in RUN/privacy: an audit that was interrupted goes on.
    """
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UsageError(f"out: expected the name of a file in an existing folder, got {out}")
    from sparsekit.cli.privacy_tables import AuditBars, print_audit
    from sparsekit.fed.allocator import keep_freed_memory
    from sparsekit.fed.attack_models import ATTACKS
    from sparsekit.fed.privacy import audit_run
    from sparsekit.fed.privacy_files import AUDIT_FILE, audit_command
    from sparsekit.fed.storage import write_json

    keep_freed_memory()
    try:
        with AuditBars() as bars:
            result = audit_run(
                run,
                watcher=bars,
                attacks=tuple(dict.fromkeys(attack)) if attack else tuple(ATTACKS),
                moments=moments,
                ensemble=ensemble,
                shuffles=shuffles,
                threads=threads,
                cache=cache,
            )
    except KeyboardInterrupt:
        again = f"interrupted; {audit_command(run)} goes on from here"
        raise KeyboardInterrupt(again) from None
    if out is not None:
        write_json(out, result)
    print_audit(run, result)
    result_console().print(f"All pairs: {run / AUDIT_FILE}", markup=False, soft_wrap=True)


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Audited runs.")],
    attack: Annotated[
        str | None, typer.Option(help="Compare by this attack alone. [default: each of them]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this file.")] = None,
) -> None:
    """Compare audited runs by sparsity, at the same round and at the same train-test gap.

    Runs of one sparsity, such as several seeds, are averaged. Says "cannot tell" where an interval
    holds 0.
    """
    if len({run.resolve() for run in runs}) < max(2, len(runs)):
        raise UsageError("compare: expected at least two runs, each once")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UsageError(f"out: expected the name of a file in an existing folder, got {out}")
    from sparsekit.cli.privacy_tables import print_comparison
    from sparsekit.fed.privacy_compare import compare_audits
    from sparsekit.fed.storage import write_json

    result = compare_audits(runs, [attack] if attack else None)
    print_comparison(result)
    if out is not None:
        write_json(out, result)
