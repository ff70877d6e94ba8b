"""Measure how hard the synthetic cohort is for networks and for simple regressors.

    python -m tools.cohort_study run FOLDER --workers 2   # goes on where it was stopped
    python -m tools.cohort_study collect FOLDER           # docs/results/cohort.json
    python -m tools.cohort_study write                    # docs/results/cohort.md

`write --check` changes nothing and exits with 1 if the page differs from what it would write.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from tools import page_command
from tools.cohort_study.page import collect, page
from tools.cohort_study.plan import Study
from tools.cohort_study.running import check_folder, run, run_with_workers


def main(argv: list[str]) -> int:
    """Run one command; return the exit code."""
    if argv[:1] != ["run"]:
        return page_command.run(__doc__, "cohort", partial(collect, Study()), page, argv)
    parser = argparse.ArgumentParser(prog="python -m tools.cohort_study run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    options = parser.parse_args(argv[1:])
    if options.workers > 1:
        check_folder(Study(), options.folder)
        return run_with_workers(options.folder, options.workers)
    run(Study(), options.folder, partial(print, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
