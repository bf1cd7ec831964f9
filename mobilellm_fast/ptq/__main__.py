"""The command `python -m mobilellm_fast.ptq`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import MobileLLMError

DESCRIPTION = """\
Quantize a float model with the help of a text, and report what that costs.

examples:
  python -m mobilellm_fast.ptq DIR --text held_out.txt                      # every format, as is
  python -m mobilellm_fast.ptq DIR --text held_out.txt --calibration some.txt --formats w8a8 int4
  python -m mobilellm_fast.ptq DIR --calibration some.txt --formats int4 --out DIR-int4

MODEL is what `mobilellm_fast.load` takes; without a calibration text, weights are rounded alone.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0, or 1 after a one-line error."""
    parser = argparse.ArgumentParser(
        prog="python -m mobilellm_fast.ptq",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a directory, hub id or .gguf file")
    parser.add_argument("--formats", nargs="+", default=["int8", "w8a8", "int4", "int4_all"])
    parser.add_argument("--text", type=Path, help="report on the first tokens of this text")
    parser.add_argument("--tokens", type=int, default=1537, help="of it (default: 1537)")
    parser.add_argument("--calibration", type=Path, help="another text, to quantize with")
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="default: 4096")
    parser.add_argument("--untie-head", action="store_true", help="see quantize_")
    parser.add_argument("--symmetric", action="store_true", help="see quantize_")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the model in one format")
    try:
        _run(parser.parse_args(argv))
    except MobileLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    if not (args.text or args.out):
        raise MobileLLMError("what to do? give --text to report on, or --out to write to")
    if args.out and len(args.formats) != 1:
        raise MobileLLMError(f"--out needs one format in --formats, got {len(args.formats)}")
    from ..loading import load
    from ..train.text import read_text
    from . import quantize_, report

    lm = load(args.model, format="fp32")
    if lm.tokenizer is None:
        raise MobileLLMError(f"{args.model}: has no tokenizer")
    options: dict = {"untie_head": args.untie_head, "symmetric": args.symmetric}
    if args.calibration:
        ids = lm.tokenizer.encode(read_text(args.calibration))
        options["calibration"] = ids[: args.calibration_tokens]
    if args.text:
        ids = lm.tokenizer.encode(read_text(args.text))[: args.tokens]
        print("| format | bits per weight | perplexity | ratio to float | KL, nats | same top |")
        print("|---|---|---|---|---|---|")
        for format in args.formats:
            (line,) = report(lm, ids, [format], **options)
            print(
                f"| {line.format} | {line.bits_per_weight:.2f} | {line.perplexity:.3f} "
                f"| {line.ratio:.4f} | {line.kl:.4f} | {line.same_top:.3f} |",
                flush=True,
            )
    if args.out:
        quantize_(lm, args.formats[0], **options).save_pretrained(args.out)


if __name__ == "__main__":
    sys.exit(main())
