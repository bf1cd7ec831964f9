"""Saved runs as plots."""

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import fill

import matplotlib
from saved_runs import Benchmark, Run
from steadiness import bandwidths

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "mobilellm_fast", "font.size": 9})
from matplotlib import pyplot  # noqa: E402  the backend is chosen before


def write_plots(run: Run, folder: Path) -> dict[str, str]:
    """Draw what the run has figures for; returns file names by title."""
    written = {}
    for name, (title, draw) in PLOTS.items():
        figure, axes = pyplot.subplots(figsize=(7, 4.2))
        try:
            if draw(run, axes):
                axes.set_title(title)
                figure.subplots_adjust(bottom=0.3)
                stamp = fill(run.stamp.replace("`", ""), 135)
                figure.text(0.02, 0.02, stamp, fontsize=5.5, color="0.35", va="bottom")
                figure.savefig(folder / name, metadata={"Date": None})
                written[title] = name
        finally:
            pyplot.close(figure)
    return written


def _decode_by_bits(run: Run, axes) -> bool:
    """Speed over bits per weight; the floor is a token's weights at the measured bandwidth."""
    drawn = [b for b in run.of("decode") if b.about.get("preset") == "default"]
    drawn = (drawn or run.of("decode"))[:1]
    points = [
        (series.facts["bits_per_weight"], series.tokens_per_s, f"ours {series.name}", "o")
        for benchmark in drawn
        for series in benchmark.series.values()
    ]
    if not points:
        return False
    parameters = drawn[0].first.facts["parameters"]
    if drawn[0].about.get("preset") == "default":
        points += list(_peer_points(run, parameters))
    placed: list[str] = []
    for bits, speed, name, marker in sorted(points):
        axes.plot(bits, speed, marker, color="tab:blue" if marker == "o" else "tab:gray")
        above = 3 if len(placed) % 2 else -8  # neighbours' names on either side of their points
        place = (4, above)
        axes.annotate(name, (bits, speed), xytext=place, textcoords="offset points", fontsize=6)
        placed.append(name)
    if drawn[0].first.probes:
        bandwidth = statistics.median(bandwidths(drawn[0].first))
        # a token's weights, once, at the bandwidth of this run
        grid = [4 + i * 0.25 for i in range(4 * 29)]
        floor = [8 * bandwidth / (parameters * bits) for bits in grid]
        axes.plot(grid, floor, "k--", linewidth=1, label=f"floor: {bandwidth / 1e9:.1f} GB/s")
        axes.legend()
    axes.set(xlabel="bits per weight", ylabel="tokens/s", xscale="log", yscale="log")
    axes.minorticks_off()
    axes.set_xticks([4, 5, 6, 8, 16, 32], ["4", "5", "6", "8", "16", "32"])
    speeds = [25, 50, 100, 200, 400, 800]
    axes.set_yticks(speeds, [f"{speed}" for speed in speeds])
    return True


def _peer_points(run: Run, parameters: int) -> Iterator[tuple[float, float, str, str]]:
    for benchmark in run.of("peers"):
        for series in benchmark.series.values():
            nbytes = series.facts.get("weight_nbytes")
            wanted = benchmark.about.get("op") == "decode" and not series.name.startswith("ours")
            if wanted and nbytes and series.seconds:
                yield 8 * nbytes / parameters, series.tokens_per_s, series.name, "s"


def _bandwidth_share(run: Run, axes) -> bool:
    bars = [
        (f"{benchmark.about['preset']} {series.name}", series.share)
        for benchmark in run.of("decode")
        if benchmark.first.facts["context"] == 128
        for series in benchmark.series.values()
        if series.share is not None
    ]
    if not bars:
        return False
    axes.bar([name for name, _ in bars], [100 * share for _, share in bars])
    axes.axhline(100, color="k", linestyle="--", linewidth=1)
    axes.tick_params(axis="x", rotation=90, labelsize=6)
    axes.set_ylabel("% of the read bandwidth of this run")
    axes.figure.subplots_adjust(top=0.92)
    return True


def _threads(run: Run, axes) -> bool:
    for benchmark in run.of("threads"):
        counts = [int(name) for name in benchmark.series]
        speedups = [1 / (benchmark.ratio(name) or 1) for name in benchmark.series]
        axes.plot(counts, speedups, "o-", label=benchmark.title.rpartition(",")[0])
        axes.plot(counts, counts, "k--", linewidth=1)
        axes.set_xticks(counts)
    axes.set(xlabel="threads", ylabel="times as fast as one")
    if run.of("threads"):
        axes.legend(fontsize=7)
    return bool(run.of("threads"))


def _sharing(run: Run, axes) -> bool:
    found = run.of("sharing")
    for place, name in enumerate(("each block twice", "twice as many blocks")):
        heights = [b.ratio(list(b.series)[place + 1]) for b in found]
        positions = [i + 0.4 * place - 0.2 for i in range(len(found))]
        for bar in axes.bar(positions, heights, 0.38, label=name):
            height = bar.get_height()
            middle = bar.get_x() + bar.get_width() / 2
            axes.annotate(f"{height:.2f}", (middle, height), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(found)), [_short(b) for b in found], fontsize=7)
    axes.axhline(1, color="k", linestyle="--", linewidth=1)
    axes.set_ylabel("times the time without sharing")
    axes.margins(y=0.25)  # room for the legend
    if found:
        axes.legend(fontsize=7, loc="upper left", ncols=2)
    return bool(found)


def _short(benchmark: Benchmark) -> str:
    return benchmark.title.removeprefix("Layer sharing, ").replace(", ", "\n")


# Name of the file -> title, and a function that draws or returns False.
PLOTS: dict[str, tuple[str, Callable]] = {
    "decode_by_bits.svg": ("Decode speed by bits per weight", _decode_by_bits),
    "bandwidth_share.svg": ("Decode at 128 tokens, share of the memory floor", _bandwidth_share),
    "threads.svg": ("Threads", _threads),
    "layer_sharing.svg": ("What layer sharing costs", _sharing),
}
