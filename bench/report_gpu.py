"""Turns the results of GPU runs into the tables of docs/gpu.md.

    python bench/report_gpu.py                   # all of bench/results/
    python bench/report_gpu.py RESULT.json ...

Replaces everything below the mark in docs/gpu.md.
"""

import argparse
import json
import sys
from pathlib import Path

from gpu_goals import GOALS
from report_tables import table

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- written by bench/report_gpu.py -->\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 1 for a file that is not a result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "gpu.md")
    args = parser.parse_args(arguments)
    paths = args.results or sorted((ROOT / "bench" / "results").glob("*.json"))
    try:
        found = [read(path) for path in paths]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    page = args.page.read_text()
    head, mark, _ = page.partition(MARK)
    body = "\n".join(report(data) for data in found) or "Not measured yet.\n"
    part = args.page.with_suffix(".part")
    part.write_text(head + (mark or MARK) + body)
    part.replace(args.page)
    print(f"wrote {args.page} from {len(found)} results")
    return 0


def read(path: Path) -> dict:
    """Read a result.

    Raises:
        ValueError: the file is not one.
    """
    try:
        data = json.loads(path.read_text())
        if missing := {"goals", "measurements", "versions"} - data.keys():
            raise KeyError(*missing)
        return data
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a result of the GPU benchmark ({error!r})") from None


def report(data: dict) -> str:
    """Write one result as Markdown."""
    parts = [f"### {data['device']}\n", stamp(data) + "\n", goals(data)]
    for kind, title in (("decode", "Decode"), ("op", "Ops")):
        if rows := measurements(data, kind):
            parts += [f"**{title}**\n", rows]
    if data["gates"]:
        parts += ["**Gates**\n", gates(data)]
    if data.get("notes"):
        parts += ["\n".join(f"- {name}: {text}" for name, text in data["notes"].items()) + "\n"]
    return "\n".join(parts)


def stamp(data: dict) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in data["versions"].items() if value)
    dry = " A dry run: its figures mean nothing." if data["dry"] else ""
    driver = f"driver {data['driver']}; " if "driver" in data else ""
    return (
        f"{data['date'][:16].replace('T', ' ')} UTC; commit {data['commit']}; {driver}{versions}; "
        f"`{data['command']}`; {data['seconds']:.0f} s.{dry}"
    )


def goals(data: dict) -> str:
    """The goals and what they reached."""
    rows = []
    for key, entry in data["goals"].items():
        goal = GOALS[key]
        faults = {case["fault"] for case in entry["cases"].values() if "fault" in case}
        cases = [
            f"{name} {goal.format(case['ratio'])}"
            for name, case in entry["cases"].items()
            if "ratio" in case
        ]
        measured = "" if entry["ratio"] is None else goal.format(entry["ratio"])
        verdict = entry["verdict"] + "".join(f": {fault}" for fault in sorted(faults))
        rows.append(
            [goal.text, goal.format(goal.must), goal.format(goal.stretch), f"**{measured}**"]
            if measured
            else [goal.text, goal.format(goal.must), goal.format(goal.stretch), ""]
        )
        rows[-1] += [cell(verdict), ", ".join(cases) if len(cases) > 1 else ""]
    return table(["goal", "must", "stretch", "measured", "reached", "of"], rows)


def measurements(data: dict, kind: str) -> str:
    """Every work of a kind, in microseconds: a step of decoding, or a call of an op."""
    rows = []
    for name, entry in data["measurements"].items():
        if entry.get("kind") != kind and "fault" not in entry:
            continue
        if "fault" in entry:
            if kind == "decode":
                rows.append([name, "", f"**failed**: {cell(entry['fault'])}", "", ""])
            continue
        for work, series in entry["series"].items():
            what = f"{work} ({series['tier']})" if "tier" in series else work
            if not series.get("seconds"):
                fault = series.get("fault", "no figure")
                rows.append([name, what, f"**failed**: {cell(fault)}", "", ""])
                continue
            low, middle, high = (f"{1e6 * series[k]:.1f}" for k in ("low", "median", "high"))
            row = [name, what, f"{middle} ({low} … {high})"]
            row.append(f"{series['tokens'] / series['median']:.0f}" if "tokens" in series else "")
            rows.append([*row, rate(series)])
    return table(["what", "work", "µs (min … max)", "tokens/s", "rate"], rows)


def rate(series: dict) -> str:
    if "operations" in series:
        return f"{series['operations'] / series['median'] / 1e12:.0f} TFLOP/s"
    return f"{series['nbytes'] / series['median'] / 1e9:.0f} GB/s" if "nbytes" in series else ""


def gates(data: dict) -> str:
    """What each gate found: divergence from float32, ours and transformers' bf16."""
    rows = []
    for name, found in data["gates"].items():
        for path in ("prompt", "steps"):
            if path in found:
                own, theirs = found[path]["kl"], found[path]["kl_transformers"]
                nll = (found[path][key] for key in ("nll", "nll_transformers", "nll_float32"))
                cells = [f"{own:.2e}", f"{theirs:.2e}", " / ".join(f"{n:.4f}" for n in nll)]
                rows.append([name, found["model"], path, *cells, cell("; ".join(found["red"]))])
    header = ["gate", "model", "path", "KL", "KL of bf16 transformers", "NLL / theirs / float32"]
    return table([*header, "red"], rows)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
