"""Measures other engines beside ours: the same weights, one run, in turns.

    python bench/peers.py list
    python bench/peers.py install llama.cpp
    python bench/peers.py compare --ours int8 --peer llama.cpp:Q8_0 --peer onnxruntime-genai:int8
    python bench/peers.py compare --ours int4 --peer llama.cpp:Q4_0:flash=off --op prefill
    python bench/peers.py compare --ours int4 --peer llama.cpp:as-shipped --quality

Each peer has a virtual environment of its own, but for torch, which has ours. An option threads=N
gives one engine its own number of threads. On the first use of a format our model is exported to
it. Exporters need torch: where the index has builds for GPUs first, have pip take a small one by
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from export import FORMATS, default_root
from machine import command, processor
from peer_compare import SEQUENCES, TOKENS, Result, compare
from peer_workers import Spec, install, state


def main() -> int:
    """Run a command; return 1 if an engine that was asked for is missing or failed."""
    args = _parser().parse_args()
    args.root = args.root.expanduser().resolve()
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument(
            "--root",
            type=Path,
            default=default_root(),
            help="has the environments and the exported models (default: %(default)s)",
        )
        return sub

    command("list", _list, "list the peers, their formats, and which are installed")
    sub = command("install", _install, "make a peer's environment, or update it")
    sub.add_argument("name", choices=FORMATS)
    sub = command("compare", _compare, "measure engines in turns; the first is the reference")
    sub.add_argument("--ours", action="append", required=True, metavar="FORMAT[:isa=NAME]")
    sub.add_argument("--peer", action="append", default=[], metavar="NAME:FORMAT[:OPTION=VALUE]")
    sub.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    sub.add_argument("--threads", type=int, default=2)
    sub.add_argument("--op", choices=TOKENS, default="decode")
    sub.add_argument("--context", type=int, default=128, help="tokens before those decoded")
    sub.add_argument("--tokens", type=int, help=f"default: {TOKENS}")
    sub.add_argument("--sequences", type=int, default=SEQUENCES, help="of a batch")
    sub.add_argument("--rounds", type=int, default=7)
    sub.add_argument("--quality", action="store_true", help="also compare predictions to fp32's")
    sub.add_argument("--json", type=Path, metavar="FILE", help="save every figure")
    return parser


def _list(args: argparse.Namespace) -> int:
    for name, formats in FORMATS.items():
        print(f"{name:18} {state(name, args.root):10} {', '.join(formats)}")
    return 0


def _install(args: argparse.Namespace) -> int:
    try:
        install(args.name, args.root)
    except (subprocess.CalledProcessError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.name} is installed in {args.root / args.name}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    try:
        specs = [Spec.parse_ours(text) for text in args.ours]
        specs += [Spec.parse(text) for text in args.peer]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options = {
        name: getattr(args, name)
        for name in (
            "model",
            "threads",
            "op",
            "context",
            "tokens",
            "sequences",
            "rounds",
            "quality",
        )
    }
    results = compare(specs, root=args.root, progress=_progress, **options)
    _print(results, args.op, args.sequences)
    if args.json:
        facts = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": processor(),
            "command": command("python bench/peers.py"),
            **options,
            "results": [
                {
                    **asdict(result),
                    "spec": str(result.spec),
                    "ratios": result.ratios(results[0]).values,
                }
                for result in results
            ],
        }
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return int(any(result.fault for result in results))


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<78}", end="\r", file=sys.stderr, flush=True)


def _print(results: list[Result], op: str, sequences: int) -> None:
    """Print a Markdown table; ratios are of the same round, times of the first engine."""
    first = results[0]
    quality = any(result.quality for result in results)
    header = [
        "engine",
        "version",
        "weights MB",
        f"{op} tokens/s",
        f"ms/{'step' if op == 'batch' else 'token'} (min … max)",
    ]
    header += [f"{first.spec} is faster by (min … max)", "each comparable round"]
    header += ["KL", "same top-1", "perplexity"] if quality else []
    for row in (header, ["---"] * len(header)):
        print("|", " | ".join(row), "|")
    for result in results:
        print("|", " | ".join(_cells(result, first, quality, op, sequences)), "|")
    for result in results:
        if result.fault:
            print(f"\n{result.spec}: {result.fault}")


def _cells(result: Result, first: Result, quality: bool, op: str, sequences: int) -> list[str]:
    about = result.about
    cells = [str(result.spec), about.get("version", "")]
    cells.append(f"{about['weight_nbytes'] / 1e6:.1f}" if about else "")
    if result.seconds:
        together = sequences if op == "batch" else 1
        cells.append(f"{together / statistics.median(result.seconds):.1f}")
        cells.append(_spread([1e3 * seconds for seconds in result.seconds]))
    else:
        cells += ["**missing**", ""]
    if result is first:
        cells += ["", ""]
    else:
        sample = result.ratios(first)
        note = f", {sample.note}" if sample.note else ""
        cells += [_spread(sample.values) + note, " ".join(f"{r:.2f}" for r in sample.values)]
    if quality and result.quality:
        figures = result.quality
        cells += [f"{figures['kl']:.5f}", f"{figures['same_top1']:.1%}"]
        cells.append(f"{figures['perplexity']:.3f} (×{figures['perplexity_ratio']:.4f})")
    elif quality:
        cells += ["", "", ""]
    return cells


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
