"""Turns saved runs into tables and plots.

    pytest bench/ --benchmark-only --benchmark-json=run1.json
    python bench/report.py run1.json
    python bench/report.py run1.json run2.json     # and how far they agree

Writes report.md and plots of the last run, and of several runs agreement.md, into docs/benchmarks/.
"""

import argparse
import sys
from pathlib import Path

import report_tables
from saved_runs import DIFFERENT, Run, agreement

DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 1 for a file that is not a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json")
    parser.add_argument("--out", type=Path, default=DOCS, help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        runs = [Run.read(path) for path in args.runs]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    write(runs, args.out)
    return 0


def write(runs: list[Run], folder: Path) -> None:
    """Write what the runs show; where matplotlib is missing, say so and leave the plots out."""
    try:
        from report_plots import write_plots
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is missing (pip install '.[bench]')", file=sys.stderr)
        plots = {}
    else:
        plots = write_plots(runs[-1], folder)
    (folder / "report.md").write_text(report_tables.report(runs[-1], plots))
    print(f"wrote {folder / 'report.md'} and {len(plots)} plots")
    if len(runs) > 1:
        stamps = "\n".join(f"{i + 1}. {run.stamp}" for i, run in enumerate(runs))
        text = f"# Agreement of runs\n\n{stamps}\n\n{report_tables.agreements(runs)}"
        (folder / "agreement.md").write_text(text)
        found = agreement(runs)
        apart = [row for row in found if row[3] > DIFFERENT]
        print(f"{len(found) - len(apart)} of {len(found)} ratios agree within {DIFFERENT:.0%}")
        for title, name, ratios, spread in apart:
            values = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            print(f"  above {DIFFERENT:.0%}: {title}: {name}: {values}, spread {spread:.1%}")


if __name__ == "__main__":
    sys.exit(main())
