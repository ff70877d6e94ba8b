"""Put one mistake at a time into a copy of the repository and see whether its check fails."""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A mistake, and what has to notice it."""

    name: str
    file: str
    text: str
    becomes: str
    runs: str
    """``"interpreter"`` or ``"ttsem"``."""
    check: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the check said of the mutant."""

    name: str
    file: str
    runs: str
    check: str
    caught: bool
    said: str
    """The last line of the failure."""


def mutants() -> list[Mutant]:
    """All that the tests list, in the order of their files."""
    sys.path.insert(0, str(ROOT))
    found = []
    for path in sorted((ROOT / "tests" / "triton").glob("mutants_*.py")):
        module = importlib.import_module(f"tests.triton.{path.stem}")
        found += [Mutant(*row) for row in module.MUTANTS]
    return found


def command(runs: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """How pytest is called in the interpreter or in ttsem, and with which environment."""
    environment = dict(os.environ, TRITON_INTERPRET="1" if runs == "interpreter" else "0")
    start = ["-m", "pytest"] if runs == "interpreter" else ["-m", "ttsem.sanitize", "pytest"]
    return [sys.executable, *start, *arguments], environment


def try_one(mutant: Mutant, tree: Path) -> Outcome:
    """Change a copy, run the check there, change the copy back.

    Raises
    ------
    ValueError
        The text is not there exactly once: the list of mutants is out of date.
    """
    path = tree / mutant.file
    original = path.read_text()
    if original.count(mutant.text) != 1:
        times = original.count(mutant.text)
        raise ValueError(f"{mutant.name}: {mutant.file} has {times} times: {mutant.text}")
    path.write_text(original.replace(mutant.text, mutant.becomes))
    try:
        line, environment = command(
            mutant.runs, mutant.check, "-q", "-x", "-p", "no:cacheprovider", "--tb=line"
        )
        done = subprocess.run(
            line, cwd=tree, env=environment, capture_output=True, text=True, timeout=300
        )
    finally:
        path.write_text(original)
    # 1: tests ran and some failed. Anything else is no verdict on the mutant, but for a crash.
    caught = (done.returncode == 1 and "1 failed" in done.stdout) or done.returncode < 0
    if not caught and done.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.name}: {' '.join(line)} ended with {done.returncode}:\n"
                           f"{done.stdout[-2000:]}{done.stderr[-2000:]}")  # fmt: skip
    return Outcome(
        mutant.name, mutant.file, mutant.runs, mutant.check, caught, _reason(done.stdout, tree)
    )


def _reason(output: str, tree: Path) -> str:
    lines = [line for line in output.splitlines() if line.startswith(("E  ", "FAILED", str(tree)))]
    text = lines[0] if lines else ""
    return text.replace(str(tree) + "/", "").strip()[:200]


def run() -> list[Outcome]:
    """Try all of them, saying so; first each check without a mistake."""
    everything = mutants()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        names = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.split("\n")  # fmt: skip
        for name in filter(None, names):
            source, target = ROOT / name, tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink() or source.exists():
                shutil.copy2(source, target, follow_symlinks=False)
        for runs in ("interpreter", "ttsem"):
            checks = sorted({m.check for m in everything if m.runs == runs})
            if not checks:
                # Without names pytest would run everything.
                continue
            line, environment = command(runs, *checks, "-q", "-p", "no:cacheprovider")
            done = subprocess.run(line, cwd=tree, env=environment, capture_output=True, text=True)
            if done.returncode or f"{len(checks)} passed" not in done.stdout:
                raise RuntimeError(
                    f"a check fails without a mistake:\n{done.stdout[-3000:]}{done.stderr[-500:]}"
                )
        for mutant in everything:
            outcome = try_one(mutant, tree)
            outcomes.append(outcome)
            print(f"  {'caught' if outcome.caught else 'MISSED'}: {mutant.name}", flush=True)
    return outcomes


def as_rows(outcomes: list[Outcome]) -> list[dict[str, object]]:
    """For a results file."""
    return [asdict(outcome) for outcome in outcomes]
