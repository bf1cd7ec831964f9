"""Turns saved runs into tables and plots.

    pytest bench/ --benchmark-only --benchmark-json=run1.json
    python bench/report.py run1.json
    python bench/report.py run1.json run2.json     # and how far they agree
    python bench/report.py --agree run1.json run2.json     # that alone, nothing is written

Writes report.md and plots of the last run, and of several runs agreement.md, into docs/benchmarks/.
Ratios that runs do not agree on within 10% are printed with their spreads, and marked in report.md.
"""

import argparse
import sys
from pathlib import Path

import report_tables
from saved_runs import Run, agreement

DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 1 for a file that is not a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json")
    parser.add_argument("--out", type=Path, default=DOCS, help="default: %(default)s")
    parser.add_argument("--agree", action="store_true", help="only compare the runs' ratios")
    args = parser.parse_args(arguments)
    if args.agree and len(args.runs) < 2:
        parser.error("--agree needs two runs or more")
    try:
        runs = [Run.read(path) for path in args.runs]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not args.agree:
        args.out.mkdir(parents=True, exist_ok=True)
        write(runs, args.out)
    if len(runs) > 1:
        compare(runs)
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
    (folder / "report.md").write_text(report_tables.report(runs[-1], plots, runs[:-1]))
    print(f"wrote {folder / 'report.md'} and {len(plots)} plots")
    print(report_tables.left_out(runs[-1]))
    if len(runs) > 1:
        stamps = "\n".join(f"{i + 1}. {run.stamp}" for i, run in enumerate(runs))
        text = f"# Agreement of runs\n\n{stamps}\n\n{report_tables.agreements(runs)}"
        (folder / "agreement.md").write_text(text)


def compare(runs: list[Run]) -> None:
    """Print how many ratios agree, and those that do not: of each run the median and its rounds."""
    found = agreement(runs)
    print(report_tables.agreed(found))
    for row in found:
        if row.apart:
            values = "; ".join(
                report_tables.spread(sample.values, digits=3)
                + (f" in {sample.note}" if sample.note else "")
                for sample in row.samples
            )
            print(f"  {row.title}: {row.name}: {values}: {row.spread:.1%} apart")


if __name__ == "__main__":
    sys.exit(main())
