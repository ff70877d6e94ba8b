"""What the terminal shows while a run goes on."""

import io

import pytest
from rich.console import Console

from sparsekit.cli import progress
from sparsekit.cli.progress import LiveWatcher


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=200, highlight=False)
    monkeypatch.setattr(progress, "notice_console", lambda: console)
    return stream


def test_the_bars_say_where_a_round_stands(screen: io.StringIO) -> None:
    sites = ["a", "[b]", "c", "d", "e"]
    with LiveWatcher("fedavg") as watcher:

        def shown() -> list[tuple[str, float, float | None]]:
            tasks = watcher._progress.tasks
            return [(task.description, task.completed, task.total) for task in tasks]

        watcher.preparing(3, 9)
        assert shown() == [("reading scans", 3, 9)]
        watcher.round_started(2, 7, sites)
        assert shown() == [("fedavg: rounds", 1, 7), ("round 2: sites", 0, 5)]
        watcher.site_answered("c")
        assert shown()[1] == ("round 2: sites", 1, 5)
        watcher.site_answered("a")
        assert shown()[1] == ("round 2: sites (waiting for \\[b], d, e)", 2, 5)
        for site in ("d", "e", "[b]"):
            watcher.site_answered(site)
        assert shown()[1] == ("round 2: sites", 5, 5)
        watcher.notice("round 2: d is out: late")
        watcher.round_finished(
            {"round": 1, "test_mae": 4.567, "sparsity_prunable": 0.5,
             "payload_down": 1000, "payload_up": 500}
        )  # fmt: skip
        watcher.round_started(8, 7, sites[:1])
        assert shown()[1] == ("final evaluation: sites", 0, 1)
    text = screen.getvalue()
    assert "round 2: d is out: late" in text
    assert "fedavg: after round   1  test MAE   4.57 years  sparsity 50.00%  sent 1.50 kB" in text
