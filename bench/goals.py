"""Measures everything that this library promises of a CPU, and prints it beside the goals.

    python bench/goals.py                      # about 25 minutes -> docs/benchmarks/goals.md
    python bench/goals.py --only own --quick   # without other engines, fewer rounds

Each part (own, peers, quality) is a section of that file with its own date and command: a run
replaces those that it measured and keeps the rest, and what is written above the first.

Works that are compared run in turns; a figure is the median of the ratios of those rounds in which
the memory was as fast for both (`steadiness.py`), with the smallest and the largest beside it, and
how many were left out. Nothing else should run meanwhile. Peers are installed by `bench/peers.py`;
a missing one is reported as missing.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import goals_own
import machine
from export import default_root
from peer_compare import Contest
from peer_workers import Spec
from steadiness import Sample

from mobilellm_fast.files import whole_file

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "goals.md"
DECODE = (
    ("int8", "int4", "int4_all"),
    ("llama.cpp:Q8_0", "onnxruntime-genai:int8", "llama.cpp:Q4_0", "onnxruntime-genai:int4"),
)
PREFILL = (
    ("int8", "int4"),
    ("llama.cpp:Q8_0", "ctranslate2:int8", "openvino:int8", "onnxruntime-genai:int8", "torch:fp32"),
)
QUALITY = ("llama.cpp:Q8_0", "llama.cpp:Q4_0", "llama.cpp:F16", "llama.cpp:as-shipped")


@dataclass(frozen=True)
class Comparison:
    """Ours against a peer: how many times as fast it must be."""

    goal: str
    ours: str
    peer: str
    must: float


def compare(
    title: str, op: str, specs: tuple, goals: list[Comparison], options: argparse.Namespace, **sizes
) -> Iterator[goals_own.Row]:
    """Measure engines in turns; yield a row per goal."""
    specs = [Spec.parse_ours(text) for text in specs[0]] + [Spec.parse(text) for text in specs[1]]
    with Contest(specs, root=options.root, threads=options.threads, progress=say) as contest:
        results = {str(r.spec): r for r in contest.measure(op, rounds=options.rounds, **sizes)}
    ours = {r.spec.format: r for r in results.values() if r.spec.name == "ours"}
    for goal in goals:
        own, peer = ours[goal.ours], results[goal.peer]
        name = f"{title}: {goal.goal}"
        if peer.fault or own.fault:
            missing = f"missing: {peer.fault or own.fault}"
            yield goals_own.Row(name, f">= {goal.must}", Sample.of([]), missing)
            continue
        speeds = [1 / statistics.median(r.seconds) for r in (own, peer)]
        together = sizes.get("sequences", 1)
        note = " against ".join(f"{together * speed:.0f}" for speed in speeds) + " tokens/s"
        yield goals_own.Row(name, f">= {goal.must}", peer.ratios(own), note)


def peers(options: argparse.Namespace) -> Iterator[goals_own.Row]:
    """Yield the goals that name other engines."""
    yield from compare(
        "decode",
        "decode",
        (DECODE[0], (*DECODE[1], "llama.cpp:as-shipped")),
        [
            Comparison("int8 / llama.cpp Q8_0", "int8", "llama.cpp:Q8_0", 1.8),
            Comparison("int8 / ONNX Runtime GenAI int8", "int8", "onnxruntime-genai:int8", 1.8),
            Comparison("int4_all / llama.cpp Q4_0", "int4_all", "llama.cpp:Q4_0", 1.45),
            Comparison("int4_all / ONNX GenAI int4", "int4_all", "onnxruntime-genai:int4", 1.45),
            Comparison("the same Q4_1 file / llama.cpp", "int4", "llama.cpp:as-shipped", 2.7),
        ],
        options,
    )
    must = {"llama.cpp:Q8_0": 2.4}
    yield from compare(
        "prompt of 512",
        "prefill",
        PREFILL,
        [Comparison(f"int8 / {p}", "int8", p, must.get(p, 1.3)) for p in PREFILL[1]],
        options,
        tokens=512,
    )
    q8 = "llama.cpp:Q8_0"
    for title, op, least, sizes in (
        ("prompt of 16", "prefill", 1.5, {"tokens": 16}),
        ("batch of 8", "batch", 2.5, {"sequences": 8}),
        ("batch of 32", "batch", 3.0, {"sequences": 32}),
    ):
        goals = [Comparison(f"int8 / {q8}", "int8", q8, least)]
        yield from compare(title, op, (("int8",), (q8,)), goals, options, **sizes)


def quality(options: argparse.Namespace) -> list[str]:
    """Return a table of what formats cost, ours and llama.cpp's."""
    specs = [Spec.parse_ours(text) for text in ("bf16", "int8", "w8a8", "int4", "int4_all")]
    specs += [Spec.parse(text) for text in QUALITY]
    lines = ["| engine, format | MB | perplexity / fp32's | KL | same first token |"]
    lines.append("| --- | --- | --- | --- | --- |")
    with Contest(specs, root=options.root, threads=options.threads, progress=say) as contest:
        for result in contest.quality():
            if result.fault:
                lines.append(f"| {result.spec} | missing: {result.fault} | | | |")
                continue
            q = result.quality
            lines.append(
                f"| {result.spec} | {result.about['weight_nbytes'] / 1e6:.1f} "
                f"| {q['perplexity_ratio']:.4f} | {q['kl']:.5f} | {q['same_top1']:.1%} |"
            )
    return lines


def say(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


def row_line(row: goals_own.Row) -> str:
    """Format a row of the table."""
    reached = ""
    if row.figures:
        low, high = min(row.figures.values), max(row.figures.values)
        reached = f"**{row.figures.median:.2f}** ({low:.2f} … {high:.2f})"
    note = "; ".join(text for text in (row.note, row.figures.note) if text)
    return f"| {row.goal} | {row.must} | {reached} | {note} |"


def goals_table(part: Callable) -> Callable[[argparse.Namespace], list[str]]:
    """Make a function that measures a part's rows, prints each, and returns their table."""

    def lines(options: argparse.Namespace) -> list[str]:
        found, discarded = ["| goal | must | reached | |", "| --- | --- | --- | --- |"], 0
        for row in part(options):
            discarded += row.figures.discarded
            found.append(row_line(row))
            print(found[-1], flush=True)
        return [
            f"Medians of {options.rounds} rounds in turns, the smallest and largest in brackets. "
            f"Left out, as the memory changed its speed: {discarded}, over all rows.",
            "",
            *found,
        ]

    return lines


# Of each part: the title of its section, and what measures it.
PARTS: dict[str, tuple[str, Callable[[argparse.Namespace], list[str]]]] = {
    "own": ("This library alone", goals_table(goals_own.rows)),
    "peers": ("Beside other engines", goals_table(peers)),
    "quality": ("Quality, on 1537 tokens of English, against fp32", quality),
}


def merged(text: str, sections: dict[str, str]) -> str:
    """Put sections, by title, into a document: in place of those it has, in the order of `PARTS`.

    What stands above its first section stays, and so do sections that are not ours.
    """
    head, *rest = re.split(r"^(?=## )", text or "# Goals of the CPU engine\n", flags=re.MULTILINE)
    old = {part.partition("\n")[0].removeprefix("## "): part for part in rest}
    new = old | {title: f"## {title}\n\n{body}" for title, body in sections.items()}
    order = [title for title, _ in PARTS.values() if title in new]
    order += [title for title in old if title not in order]
    return "\n\n".join(part.strip("\n") for part in (head, *(new[t] for t in order))) + "\n"


def stamp(options: argparse.Namespace) -> str:
    """Say what machine, when, and how."""
    facts = machine.facts()
    return (
        f"{facts['processor']}, {options.threads} threads, {facts['system']}, mobilellm_fast "
        f"{facts['versions']['mobilellm_fast']}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, "
        f"load {facts['load_average']:.1f} at the start. "
        f"Command: `{machine.command('python bench/goals.py')}`."
    )


def main() -> int:
    """Measure what is asked for; write each part when it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = machine.available_cpus()
    parser.add_argument("--only", choices=PARTS, help="one of the parts")
    parser.add_argument("--threads", type=int, default=cores, help="of every engine; all cores")
    parser.add_argument("--root", type=Path, default=default_root(), help="of the peers")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="docs/benchmarks/goals.md")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7")
    options = parser.parse_args()
    if options.threads < 1:
        parser.error(f"argument --threads: must be at least 1, got {options.threads}")
    options.rounds = 3 if options.quick else 7
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name, (title, part) in PARTS.items():
        if options.only in (None, name):
            say(title)
            body = "\n".join([stamp(options), "", *part(options)])
            text = options.output.read_text() if options.output.exists() else ""
            with whole_file(options.output) as file:
                file.write(merged(text, {title: body}).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
