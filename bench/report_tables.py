"""Saved runs as Markdown tables."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from saved_runs import DIFFERENT, KINDS, Agreement, Benchmark, Run, Series, agreement
from steadiness import SAME


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Format cells as a Markdown table; nothing if there are no rows."""
    rows = list(rows)
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def spread(values: list[float], scale: float = 1, digits: int = 2) -> str:
    """Format a median with its smallest and largest value."""
    if not values:
        return ""
    low, middle, high = (
        f"{scale * value:.{digits}f}"
        for value in (min(values), statistics.median(values), max(values))
    )
    return middle if low == high else f"{middle} ({low} … {high})"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def ratio(benchmark: Benchmark, series: Series) -> str:
    """Format how long a work took beside the reference of its benchmark.

    Where rounds were left out, or other runs found another ratio, that is part of it.
    """
    sample = benchmark.ratios(series.name)
    if sample is None:
        return "1"
    apart = benchmark.apart.get(series.name)
    between = "" if apart is None else f"**{apart:.0%} between runs**"
    notes = [spread(sample.values), sample.note, between]
    return ", ".join(note for note in notes if note)


def limits(run: Run) -> str:
    """The machine's limits, at the start of the run and at its end."""
    rows = []
    ends = run.machine.get("limits_end") or {}
    for threads, found in run.machine["limits"].items():
        end = ends.get(threads, {})

        def both(name, scale, digits=1, found=found, end=end):
            values = [v[name] for v in (found, end) if v.get(name)]
            return " → ".join(f"{scale * value:.{digits}f}" for value in values)

        row = [threads, both("memory", 1e-9), both("last_level", 1e-9), both("l2", 1e-9)]
        row.append(both("barrier_seconds", 1e9, 0))
        for isa in run.machine["isas"]:
            row.append(f"{found[isa]['int8'] / 1e9:.0f} / {found[isa]['fp32'] / 1e9:.0f}")
        rows.append(row)
    header = ["threads", "memory GB/s", "last-level cache GB/s", "L2 GB/s", "barrier ns"]
    header += [f"{isa}: int8 / fp32 Gop/s" for isa in run.machine["isas"]]
    return table(header, rows)


def ops(benchmarks: list[Benchmark]) -> str:
    header = ["op", "table", "µs (min … max)", "GB/s", "Gop/s", "of the limit", "time / first"]
    return table(
        header,
        (
            [
                benchmark.title,
                series.name,
                spread(series.seconds, 1e6, 1),
                f"{series.facts['nbytes'] / series.median / 1e9:.1f}",
                f"{series.facts['operations'] / series.median / 1e9:.1f}",
                percent(series.share),
                ratio(benchmark, series),
            ]
            for benchmark in benchmarks
            for series in benchmark.series.values()
        ),
    )


def models(benchmarks: list[Benchmark]) -> str:
    energy = any(s.joules_per_token for b in benchmarks for s in b.series.values())
    header = ["what", "work", "bits per weight", "MB", "tokens/s", "ms (min … max)"]
    header += ["of the limit", "time / first"] + (["mJ per token"] if energy else [])
    rows = []
    for benchmark in benchmarks:
        for series in benchmark.series.values():
            row = [
                benchmark.title,
                series.name,
                f"{series.facts['bits_per_weight']:.2f}",
                f"{series.facts['weight_nbytes'] / 1e6:.1f}",
                f"{series.tokens_per_s:.1f}",
                spread(series.seconds, 1e3),
                percent(series.share),
                ratio(benchmark, series),
            ]
            joules = series.joules_per_token
            rows.append(row + ([f"{1e3 * joules:.1f}" if joules else ""] if energy else []))
    note = "" if energy or not benchmarks else "\nCPU energy: not readable here.\n"
    return table(header, rows) + note


def starts(benchmarks: list[Benchmark]) -> str:
    parts = ("import", "load", "first_token")
    header = ["what", "start", "process to first token, ms", *(f"{part}, ms" for part in parts)]
    return table(
        [*header, "peak MB"],
        (
            [
                benchmark.title,
                series.name,
                spread(series.seconds, 1e3, 0),
                *(spread(series.facts["parts"][part], 1e3, 0) for part in parts),
                spread(series.facts["parts"]["peak_nbytes"], 1e-6, 0),
            ]
            for benchmark in benchmarks
            for series in benchmark.series.values()
        ),
    )


def paper(benchmarks: list[Benchmark]) -> str:
    header = ["model", "engine", "load ms", "init ms", "execute ms", "execute / first", "peak MB"]
    rows = []
    for benchmark in benchmarks:
        for series in benchmark.series.values():
            facts, parts = series.facts, series.facts["parts"]
            cells = [spread(parts[part], 1e3, 1) for part in ("load", "init", "execute")]
            repeat = ratio(benchmark, series)
            peak = spread(parts["peak_nbytes"], 1e-6, 0)
            rows.append([facts["model"], facts["engine"], *cells, repeat, peak])
        figures = {s.facts["model"]: s.facts["paper"] for s in benchmark.series.values()}
        for model, values in figures.items():
            if values:
                beside = f"{values[2] / next(iter(figures.values()))[2]:.2f}"
                cells = [f"{value:.1f}" for value in values]
                rows.append([model, "the paper, iPhone 13", *cells, beside, ""])
    return table(header, rows)


def peers(benchmarks: list[Benchmark]) -> str:
    header = ["what", "engine", "version", "weights MB", "tokens/s", "ms (min … max)"]
    rows = []
    for benchmark in benchmarks:
        for series in benchmark.series.values():
            facts = series.facts
            nbytes = facts.get("weight_nbytes")
            row = [benchmark.title, series.name, facts.get("version", "")]
            row.append(f"{nbytes / 1e6:.1f}" if nbytes else "")
            if series.seconds:
                row += [f"{series.tokens_per_s:.1f}", spread(series.seconds, 1e3)]
                row.append(ratio(benchmark, series))
            else:
                row += [f"**missing**: {facts.get('fault')}", "", ""]
            rows.append(row)
    return table([*header, "time / first"], rows)


def quality(benchmarks: list[Benchmark]) -> str:
    header = ["engine", "weights MB", "perplexity", "ratio to fp32", "KL (nats)", "same top-1"]
    rows = []
    for benchmark in benchmarks:
        for series in benchmark.series.values():
            facts, found = series.facts, series.facts.get("quality")
            nbytes = facts.get("weight_nbytes")
            row = [series.name, f"{nbytes / 1e6:.1f}" if nbytes else ""]
            if found:
                row += [f"{found['perplexity']:.3f}", f"{found['perplexity_ratio']:.4f}"]
                row += [f"{found['kl']:.5f}", f"{found['same_top1']:.1%}"]
            else:
                row += [f"**missing**: {facts.get('fault')}", "", "", ""]
            rows.append(row)
    return table(header, rows)


TABLES: dict[str, Callable[[list[Benchmark]], str]] = {
    "op": ops,
    "start": starts,
    "paper": paper,
    "peers": peers,
    "quality": quality,
} | dict.fromkeys(("decode", "prefill", "batch", "sharing", "threads"), models)


def agreements(runs: list[Run]) -> str:
    """How far runs agree on the ratio of each work to the first of its benchmark."""
    found = agreement(runs)
    if not found:
        return "The runs have no ratio in common.\n"
    header = ["what", "work", *(f"run {i + 1}" for i in range(len(runs))), "between runs", ""]
    rows = (
        [
            row.title,
            row.name,
            *(spread(sample.values, digits=3) for sample in row.samples),
            f"{row.spread:.1%}",
            f"**above {DIFFERENT:.0%}**" if row.apart else "",
        ]
        for row in found
    )
    return f"{agreed(found)}. In brackets the rounds of each run.\n\n" + table(header, rows)


def agreed(found: list[Agreement]) -> str:
    """Count the ratios on which runs agree."""
    same = sum(not row.apart for row in found)
    return f"{same} of {len(found)} ratios agree within {DIFFERENT:.0%}"


def left_out(run: Run) -> str:
    """Count the rounds of ratios that unsteady memory spoiled."""
    samples = [s for b in run.benchmarks for name in b.series if (s := b.ratios(name))]
    rounds = sum(sample.rounds for sample in samples)
    unsteady = sum(not sample.steady for sample in samples)
    return (
        f"{sum(s.discarded for s in samples)} of {rounds} rounds of ratios do not count, the "
        f"memory having changed its speed by more than {SAME - 1:.0%} within them; "
        f"{unsteady} of {len(samples)} ratios have no round that counts, and show all of them."
    )


def report(run: Run, plots: dict[str, str], others: Sequence[Run] = ()) -> str:
    """Write a run as Markdown.

    Args:
        run: what to show.
        plots: file names by title.
        others: earlier runs of the same; ratios that they do not agree on are marked.
    """
    parts = ["# Benchmarks\n", f"{run.stamp}\n", f"{left_out(run)}\n"]
    if others:
        found = agreement([*others, run])
        run.mark(found)
        parts.append(f"With {len(others)} other run(s): {agreed(found)}; the others are marked.\n")
    parts += ["## Limits of this machine\n", limits(run)]
    parts += [f"![{title}]({name})\n\n{title}. {run.stamp}\n" for title, name in plots.items()]
    for kind, title in KINDS.items():
        if benchmarks := run.of(kind):
            parts += [f"## {title}\n", TABLES[kind](benchmarks), f"{run.stamp}\n"]
    if run.missing:
        parts += ["## Missing from this run\n", "\n".join(f"- {m}" for m in run.missing) + "\n"]
    return "\n".join(parts)
