"""``report.html``: one self-contained page about one run, or about several side by side."""

import base64
import html
import io
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate, compress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsekit.errors import MissingExtraError
from sparsekit.fed.compare import load_people, load_result, run_names
from sparsekit.fed.privacy_files import AUDIT_FILE, load_audit
from sparsekit.fed.privacy_tables import attack_rows, audit_note, pair_rows, training_rows
from sparsekit.fed.storage import write_atomically
from sparsekit.fed.tables import difference_cells, line_items, saving_cells
from sparsekit.fed.unfinished import read_progress, site_items, state_items, way_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2430; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
       border-bottom: 1px solid #dde3ea; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } .note { color: #566173; }
"""

# A fixed salt makes the identifiers inside the SVG, and so the whole page, reproducible.
_RC: dict[Any, Any] = {
    "figure.autolayout": True,
    "axes.spines.top": False,
    "svg.hashsalt": "sparsekit",
    # Names of sites and runs are shown as they are: a dollar sign is no formula, and letters that
    # matplotlib's own font lacks are drawn by the browser.
    "text.parse_math": False,
    "svg.fonttype": "none",
}

_COLOURS = ("#1f6fb4", "#d1622b", "#3a8f4d", "#8a4fa3", "#8b6b4a", "#c2417c", "#5b6470")


def write_report(runs: Sequence[Path], path: Path) -> None:
    """Write one HTML page about finished runs; it needs no network to be read.

    Parameters
    ----------
    runs : sequence of Path
        Run folders; savings and differences are relative to the first.
    path : Path
        File to write, atomically.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    RunError
        If a run is not finished or damaged.
    """
    mpl = _matplotlib()
    results = [load_result(run) for run in runs]
    names = run_names(runs)
    # A legend leaves out names that begin with an underscore.
    labels = [f" {name}" if name.startswith("_") else name for name in names]
    with mpl.rc_context(_RC):
        figures = [
            ("Error against rounds, bytes and computation", _progress(results, labels)),
            ("Sparsity by layer", _layers(results, labels)),
            ("Error by site", _sites(results, labels)),
        ]
        # Of other machines' people only sums are known.
        here = [r["data"]["age_min"] is not None for r in results]
        if any(here):
            scatter = _scatter(list(compress(runs, here)), list(compress(labels, here)))
            figures.append(("Predicted against true age", scatter))
        images = [(title, _as_image(figure)) for title, figure in figures]
    title = "sparsekit: " + " and ".join(names)
    parts = [
        *_head(title),
        "<p class='note'>A research tool, not a medical device. Errors are of people held out at "
        "their own site. Bytes are those of the messages really made; FLOPs <em>counted</em> "
        "follow the masks of every step, FLOPs <em>executed</em> the kernels that really ran.</p>",
        _table(runs, results, names),
        *_figures(images),
        *(part for run, name in zip(runs, names, strict=True) for part in _privacy(run, name)),
    ]
    parts.append(_settings(results, names))
    parts.append("</body></html>\n")
    write_atomically(path, "\n".join(parts).encode())


def write_progress_report(run: Path, path: Path) -> None:
    """Write one HTML page about a run that goes on or has stopped; see `write_report`.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    UsageError, RunError
        If ``run`` is not the folder of a run, or damaged.
    """
    mpl = _matplotlib()
    progress = read_progress(run)
    (name,) = run_names([run])
    known: dict[str, Any] = {"history": progress.history, "yardsticks": {}}
    images: list[tuple[str, str]] = []
    if progress.history:
        layers = progress.history[-1]["layer_sparsity"]
        known["sparsity"] = {"layers": layers}
        with mpl.rc_context(_RC):
            figures = [
                ("Error against rounds, bytes and computation", _progress([known], [name])),
                ("Sparsity by layer", _layers([known], [name])),
            ]
            images = [(heading, _as_image(figure)) for heading, figure in figures]
    title = f"sparsekit: {name}, not finished"
    head = ("site", "usable replies", "other outcomes", "seconds of a reply, median")
    parts = [
        *_head(title),
        "<p class='note'>What the run's folder told when this page was written.</p>",
        f"<p>{html.escape(way_on(run, progress))}</p>",
        _rows([*state_items(progress).items()]),
        "<h2>Sites</h2>",
        _rows([head, *site_items(progress)]),
        *_figures(images),
        "<h2>End of the log</h2>",
        f"<pre>{html.escape(chr(10).join(progress.log))}</pre>",
        "</body></html>\n",
    ]
    write_atomically(path, "\n".join(parts).encode())


def _rows(rows: Sequence[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "\n".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _head(title: str) -> list[str]:
    return [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]


def _figures(images: Sequence[tuple[str, str]]) -> list[str]:
    return [
        f"<h2>{html.escape(heading)}</h2>\n"
        f"<img alt='{html.escape(heading)}' src='data:image/svg+xml;base64,{data}'>"
        for heading, data in images
    ]


def _matplotlib() -> ModuleType:
    try:
        import matplotlib as mpl
    except ImportError:
        raise MissingExtraError(
            "the report's plots need matplotlib: pip install 'sparsekit3d[report]'"
        ) from None
    return mpl


def _table(runs: Sequence[Path], results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    columns = [line_items(result) for result in results]
    rows = {item: [column.get(item, "-") for column in columns] for item in columns[0]}
    if len(runs) > 1:
        rows |= saving_cells(runs)
        rows["MAE minus the first's [95 %, paired]"] = difference_cells(runs)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = [f"<table><tr><th></th>{head}</tr>"]
    for item, cells in rows.items():
        values = "".join(f"<td class='number'>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr><td>{html.escape(item)}</td>{values}</tr>")
    lines.append("</table>")
    return "\n".join(lines)


def _privacy(run: Path, name: str) -> list[str]:
    """Return the section of a run's audit, if there was one."""
    if not (run / AUDIT_FILE).exists():
        return []
    audit = load_audit(run)
    parts = [
        f"<h2>Membership inference: {html.escape(name)}</h2>",
        f"<p class='note'>{html.escape(audit_note(audit))}</p>",
        _rows(attack_rows(audit)),
        "<h2>Along the training: AUC of each attack</h2>",
        _rows(training_rows(audit)),
    ]
    for attack in audit["attacks"]:
        parts += [
            f"<details><summary>All pairs: {html.escape(attack)}</summary>",
            _rows(pair_rows(audit, attack)),
            "</details>",
        ]
    return parts


def _settings(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    lines = ["<h2>Settings and machine</h2><table>"]
    for name, result in zip(names, results, strict=True):
        for label, values in (("settings", result["config"]), ("machine", result["machine"])):
            text = ", ".join(f"{key} = {value}" for key, value in values.items())
            lines.append(
                f"<tr><td>{html.escape(name)}</td><td>{label}</td><td>{html.escape(text)}</td></tr>"
            )
    lines.append("</table>")
    return "\n".join(lines)


def _as_image(figure: "Figure") -> str:
    stream = io.BytesIO()
    # Without a date and versions, the same run gives the same report.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        # Of letters that matplotlib cannot measure: the browser draws them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="svg", metadata=metadata)
    return base64.b64encode(stream.getvalue()).decode()


def _new_figure(width: float, height: float, columns: int) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def _progress(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> "Figure":
    figure, (by_round, by_bytes, by_flops) = _new_figure(12, 4, 3)
    for result, name, colour in zip(results, names, _cycle(len(names)), strict=True):
        history = [entry for entry in result["history"] if entry.get("test_mae") is not None]
        error = [entry["test_mae"] for entry in history]
        sent = accumulate(entry["payload_down"] + entry["payload_up"] for entry in history)
        work = accumulate(entry["flops_counted"] for entry in history)
        by_round.plot([e["round"] for e in history], error, color=colour, label=name)
        by_bytes.plot([count / 1e6 for count in sent], error, color=colour)
        by_flops.plot([count / 1e12 for count in work], error, color=colour)
    yardsticks = results[0]["yardsticks"]
    for style, (name, one) in zip(("--", ":", "-."), yardsticks.items(), strict=False):
        by_round.axhline(one["test_mae"], color="#777777", linestyle=style, label=name)
    by_round.set_xlabel("round")
    by_bytes.set_xlabel("payload so far, up and down (MB)")
    by_flops.set_xlabel("training FLOPs counted so far (TFLOP)")
    for axes in (by_round, by_bytes, by_flops):
        axes.set_ylabel("test MAE (years)")
        axes.set_ylim(bottom=0)
    by_round.legend(fontsize=8)
    return figure


def _layers(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> "Figure":
    figure, panels = _new_figure(4.2 * len(results) + 1, 4, len(results))
    for axes, result, name in zip(panels, results, names, strict=True):
        history = result["history"]
        layers = list(result["sparsity"]["layers"])
        for layer in layers:
            values = [entry["layer_sparsity"].get(layer, 0.0) for entry in history]
            axes.plot([entry["round"] for entry in history], values, label=layer)
        axes.plot(
            [entry["round"] for entry in history],
            [entry["sparsity_prunable"] for entry in history],
            color="black",
            linewidth=2,
            label="all prunable weights",
        )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("round")
        axes.set_ylabel("fraction pruned")
        axes.set_ylim(-0.02, 1.02)
        axes.legend(fontsize=7)
    return figure


def _sites(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> "Figure":
    figure, (axes,) = _new_figure(10, 4, 1)
    sites = sorted({site for result in results for site in result["accuracy"]["site_mae"]})
    size = 0.8 / len(results)
    for number, (result, name) in enumerate(zip(results, names, strict=True)):
        values = [result["accuracy"]["site_mae"].get(site, np.nan) for site in sites]
        places = np.arange(len(sites)) + (number - (len(results) - 1) / 2) * size
        axes.bar(places, values, width=size, color=_cycle(len(results))[number], label=name)
    counts = results[0]["accuracy"]["site_n"]
    axes.set_xticks(range(len(sites)))
    axes.set_xticklabels([f"{site}\nn = {counts.get(site, 0)}" for site in sites], fontsize=8)
    axes.set_ylabel("test MAE (years)")
    axes.legend(fontsize=8)
    return figure


def _scatter(runs: Sequence[Path], names: Sequence[str]) -> "Figure":
    figure, panels = _new_figure(4.2 * len(runs) + 1, 4, len(runs))
    for axes, run, name, colour in zip(panels, runs, names, _cycle(len(names)), strict=True):
        people = load_people(run)
        axes.scatter(people["age"], people["predicted"], s=8, color=colour)
        low, high = float(people["age"].min()), float(people["age"].max())
        axes.plot([low, high], [low, high], color="#777777", linewidth=1)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("age (years)")
        axes.set_ylabel("predicted age (years)")
    return figure


def _cycle(count: int) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]
