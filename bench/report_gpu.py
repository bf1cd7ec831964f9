"""Turns the results of GPU runs into the tables of docs/gpu.md.

    python bench/report_gpu.py                   # all of bench/results/
    python bench/report_gpu.py RESULT.json ...

Replaces everything below the mark in docs/gpu.md: of each device the newest run is written out, an
older one is a line with its ratios and the name of its file.
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
        found = [(path, read(path)) for path in paths]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    page = args.page.read_text()
    head, mark, _ = page.partition(MARK)
    body = results(found) or "Not measured yet.\n"
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
        if missing := {"device", "date", "goals", "measurements", "versions"} - data.keys():
            raise KeyError(*missing)
        return data
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a result of the GPU benchmark ({error!r})") from None


def results(found: list[tuple[Path, dict]]) -> str:
    """Write results as Markdown, of each device the newest first and in full."""
    devices: dict[str, list[tuple[Path, dict]]] = {}
    for path, data in sorted(found, key=lambda item: item[1]["date"], reverse=True):
        devices.setdefault(data["device"], []).append((path, data))
    parts = []
    for runs in devices.values():
        (path, newest), *older = runs
        parts.append(report(newest, path, [data for _, data in older]))
        if older:
            lines = [f"- {line(data, path)}" for path, data in older]
            parts.append("\n".join(["**Older runs**\n", *lines]) + "\n")
    return "\n".join(parts)


def line(data: dict, path: Path) -> str:
    """Write an older result in a line: what its goals reached, by their names in the table."""
    ratios = [
        f"{key} {GOALS[key].format(entry['ratio'])}"
        for key, entry in data["goals"].items()
        if entry["ratio"] is not None and key in GOALS
    ]
    notes = " ".join(data.get("notes", {}).values())
    text = f"{when(data)}, commit {data['commit']}, `{path.name}`: {', '.join(ratios) or 'no goal'}"
    return f"{text}.{' ' * bool(notes)}{notes}"


def when(data: dict) -> str:
    return f"{data['date'][:16].replace('T', ' ')} UTC"


def report(data: dict, path: Path, older: list[dict]) -> str:
    """Write one result as Markdown.

    Args:
        data: the result.
        path: of its file.
        older: results of the same device, the newest first, for goals that `data` has no figure of.
    """
    parts = [f"### {data['device']}\n", f"{stamp(data)} `{path.name}`.\n", goals(data, older)]
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
        f"{when(data)}; commit {data['commit']}; {driver}{versions}; "
        f"`{data['command']}`; {data['seconds']:.0f} s.{dry}"
    )


def goals(data: dict, older: list[dict]) -> str:
    """The goals and what they reached, or what the newest older run with a figure says."""
    rows = []
    for key, entry in data["goals"].items():
        goal = GOALS[key]
        measured = "" if entry["ratio"] is None else goal.format(entry["ratio"])
        faults = {case["fault"] for case in entry["cases"].values() if "fault" in case}
        verdict = entry["verdict"] + "".join(f": {fault}" for fault in sorted(faults))
        if not measured:
            verdict += before(key, older)
        cases = [
            f"{name} {goal.format(case['ratio'])}"
            for name, case in entry["cases"].items()
            if "ratio" in case
        ]
        row = [f"`{key}`", goal.text, goal.format(goal.must), goal.format(goal.stretch)]
        row += [f"**{measured}**" if measured else "", cell(verdict)]
        rows.append([*row, ", ".join(cases) if len(cases) > 1 else ""])
    return table(["", "goal", "must", "stretch", "measured", "reached", "of"], rows)


def before(key: str, older: list[dict]) -> str:
    """Say what the newest of older runs that has a figure of a goal found."""
    for data in older:
        entry = data["goals"].get(key, {})
        if entry.get("ratio") is not None:
            ratio = GOALS[key].format(entry["ratio"])
            return f"; {ratio}, {entry['verdict']}, on {when(data)}"
    return ""


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
