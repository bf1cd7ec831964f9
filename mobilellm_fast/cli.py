"""The `mobilellm-fast` command. Subcommands import what they need, so that --help is instant."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from .errors import MobileLLMError
from .version import __version__

DESCRIPTION = """\
Run MobileLLM-class language models on this machine.

examples:
  mobilellm-fast generate "The capital of France is"
  mobilellm-fast chat --system "Answer in one sentence." --temperature 0.7 --top-p 0.9
  mobilellm-fast generate - --max-new-tokens 100 < prompt.txt
  mobilellm-fast score README.md --window 2048
  mobilellm-fast info --model path/to/model.gguf
  mobilellm-fast pack --model path/to/model.gguf model.mlf
  mobilellm-fast bench -p 512 -n 128 -o json

MODEL is a Hugging Face directory or hub id, a .gguf or a packed .mlf file, or 'tiny', a toy in this
package; without one, SmolLM2-135M-Instruct is used (fetched once, 98 MB). 'mobilellm-fast COMMAND
--help' explains the options of a command.
"""

CHAT_KEYS = """\
Ctrl-C stops an answer, Ctrl-D or /exit leaves, /clear forgets the conversation, /help says so."""
CHAT_HELP = f"""{CHAT_KEYS}
When standard input is not a terminal, each of its lines is one message.
"""

# Option of the generation API -> type, placeholder, help. The command line takes them under the
# same names and leaves out what is not given, so that the defaults have one home.
GENERATION_OPTIONS = {
    "max_new_tokens": (int, "N", "most tokens to generate (default: 256; chat: 1024)"),
    "temperature": (float, "T", "0 takes the most likely token (default), 1 samples plainly"),
    "top_k": (int, "K", "sample among the K most likely tokens"),
    "top_p": (float, "P", "sample among the fewest tokens of total probability P"),
    "min_p": (float, "P", "sample among tokens at least P times as likely as the likeliest"),
    "repetition_penalty": (float, "R", "above 1 makes tokens seen before less likely"),
    "seed": (int, "SEED", "the same seed samples the same text again"),
    "prompt_lookup": (int, "K", "guess K tokens per step where the text repeats: the same, sooner"),
    "prompt_lookup_ngram": (int, "N", "look for the last N tokens to guess (default: 3)"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0, or 1 after a one-line error, or 130 after Ctrl-C.

    Raises:
        SystemExit: --help and --version (0), wrong usage (2).
    """
    if sys.stderr is None:  # closed, as may be the others; print() would take standard output
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    args, unknown = _parser().parse_known_args(argv)
    if unknown:  # with the usage of the command, where argparse shows that of the whole
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know a model's characters
    if hasattr(sys.stdin, "reconfigure"):
        # a pipe is UTF-8 in any locale, as files are, with or without a byte order mark
        encoding = None if sys.stdin.isatty() else "utf-8-sig"
        sys.stdin.reconfigure(encoding=encoding, errors="strict")
    try:
        if sys.stdout is None:
            raise MobileLLMError("standard output must be open to write, got a closed one")
        args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads us (`| head`) has seen enough: no failure of ours
        _discard_unwritable_output()
        return 0
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        _print_error(f"the input is not valid UTF-8: {error.reason} at byte {error.start}")
    except OSError as error:
        _discard_unwritable_output()
        reason = error.strerror or str(error)
        _print_error(f"{error.filename}: {reason}" if error.filename else reason)
    except (MobileLLMError, ImportError, MemoryError) as error:
        _print_error(str(error) or type(error).__name__)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mobilellm-fast",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run, help: str, epilog: str = "", runs: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, epilog=epilog)
        sub.set_defaults(run=run, parser=sub)
        model = sub.add_argument_group("model")
        model.add_argument("--model", metavar="MODEL", help="directory, hub id, .gguf or .mlf file")
        model.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
        model.add_argument(
            "--format", default="auto", help="auto, fp32, bf16, int8, w8a8, int4 or int4_all"
        )
        if not runs:
            return sub
        model.add_argument(
            "--kv-format",
            metavar="FORMAT",
            help="of the KV cache: fp16, fp32, int16, int8 (CPU) or bf16 (GPU)",
        )
        model.add_argument("--threads", type=int, metavar="N", help="default: chosen for you")
        model.add_argument("--device", default="cpu", help="cpu (the default), cuda or cuda:N")
        model.add_argument("--isa", metavar="NAME", help="force an instruction set ('info' lists)")
        return sub

    sub = command("generate", _generate, "continue a prompt")
    sub.add_argument("prompt", metavar="PROMPT", help="'-' reads standard input")
    _add_generation_options(sub)

    sub = command("chat", _chat, "talk with an instruction-tuned model", CHAT_HELP)
    sub.add_argument("--system", metavar="TEXT", help="instructions that precede the conversation")
    _add_generation_options(sub, max_new_tokens=1024)

    sub = command("score", _score, "print how well the model predicts a text (perplexity)")
    sub.add_argument("file", metavar="FILE", help="UTF-8 text; '-' reads standard input")
    sub.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="score a text longer than the context in windows of N tokens, "
        "each starting with no more than one token of context",
    )

    sub = command("pack", _pack, "write a model as one file that loads in milliseconds", runs=False)
    sub.add_argument("output", metavar="FILE", help="to write, such as model.mlf")

    command("info", _info, "describe the model and how it would run here")

    sub = command("bench", _bench, "measure prefill and decode speed")
    sub.add_argument("-p", "--prompt-tokens", type=int, nargs="*", default=[512], metavar="N")
    sub.add_argument("-n", "--new-tokens", type=int, nargs="*", default=[128], metavar="N")
    sub.add_argument("-r", "--repetitions", type=int, default=5, metavar="N")
    sub.add_argument("-b", "--batch", type=int, default=1, metavar="N", help="sequences at once")
    sub.add_argument("-o", "--output", choices=("md", "json", "csv"), help="default: a table")
    return parser


def _add_generation_options(sub: argparse.ArgumentParser, **defaults: Any) -> None:
    group = sub.add_argument_group(
        "generation",
        "Without a --temperature above 0, --top-k, --top-p, --min-p and --seed change nothing.",
    )
    for name, (kind, metavar, help) in GENERATION_OPTIONS.items():
        flags = ["--" + name.replace("_", "-")]
        if name == "max_new_tokens":
            flags.append("-n")  # as in bench and mobilellm-run
        default = defaults.get(name)
        group.add_argument(*flags, type=kind, metavar=metavar, help=help, default=default)
    group.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text")
    group.add_argument("--verbose", action="store_true", help="print timings to standard error")


def _generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given, checked before a model is loaded for them."""
    from .generate import Options

    given = {name: getattr(args, name) for name in (*GENERATION_OPTIONS, "stop")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.stop:
        given["stop"] = [_argument(text) for text in args.stop]
    Options(**given)
    return given


def _load(args: argparse.Namespace):
    if args.device != "cpu":
        return _load_on_gpu(args)
    from .engine import Engine

    return Engine.load(
        args.model,
        format=args.format,
        threads=args.threads,
        revision=args.revision,
        isa=args.isa,
        kv_format=args.kv_format,
    )


def _load_on_gpu(args: argparse.Namespace):
    for name in ("threads", "isa"):
        if getattr(args, name) is not None:
            raise MobileLLMError(f"[load] {name} is for device 'cpu', got {getattr(args, name)!r}")
    if args.device.partition(":")[0] != "cuda":
        raise MobileLLMError(
            f"[load] device must be 'cpu', 'cuda' or 'cuda:N', got {args.device!r}"
        )
    from .cuda.engine import CudaEngine

    return CudaEngine.load(
        args.model,
        device=args.device,
        format=args.format,
        revision=args.revision,
        kv_format=args.kv_format,
    )


def _generate(args: argparse.Namespace) -> None:
    from .generate import stream

    options = _generation_options(args)
    prompt = _argument(args.prompt)
    if prompt == "-":  # as typed with `echo`: the newline that ends the input is not meant
        prompt = _read("-").removesuffix("\n").removesuffix("\r")
    _show(stream(_load(args), prompt, **options), args.verbose)


def _chat(args: argparse.Namespace) -> None:
    from .prompt import chat_ids
    from .session import Session

    options = _generation_options(args)
    engine = _load(args)
    beginning = [{"role": "system", "content": _argument(args.system)}] if args.system else []
    # A model that cannot chat should say so before the first question, not after it.
    chat_ids(engine, [*beginning, {"role": "user", "content": "Hello"}])
    interactive = _stdin().isatty()
    session = Session(engine, beginning)
    for message in _messages(interactive):
        if message == "/exit":
            return
        if message == "/help":
            print(CHAT_KEYS, file=sys.stderr)
            continue
        if message == "/clear":
            session = Session(engine, beginning)
            continue
        try:
            answer = session.stream_chat(message, **options)
        except MobileLLMError as error:  # the conversation has outgrown the context
            if not interactive:
                raise
            _print_error(f"{error} (/clear starts a new conversation)")
            continue
        with contextlib.suppress(KeyboardInterrupt):  # stops the answer, not the program
            _show(answer, args.verbose)


def _messages(interactive: bool) -> Iterator[str]:
    """Yield what the user says, without blank lines, until the input ends."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and a history)
    while True:
        try:
            # A prompt would only be noise in redirected output.
            line = input("> " if interactive and sys.stdout.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\nCtrl-D or /exit leaves", file=sys.stderr)
            continue
        if line.strip():
            yield line.strip()


def _show(tokens, verbose: bool) -> None:
    """Print an answer as it comes and end its line, even when it is interrupted."""
    last = ""
    try:
        for token in tokens:
            sys.stdout.write(token.text)
            sys.stdout.flush()
            last = token.text or last
    finally:
        if not last.endswith("\n"):
            print(flush=True)
    if verbose:
        _print_timings(tokens.generation)


def _print_timings(done) -> None:
    t = done.timings
    reused = f", {t.reused_tokens} reused" if t.reused_tokens else ""
    lines = [
        f"prefill: {t.prefill_tokens} tokens in {t.prefill_seconds:.3f} s "
        f"({t.prefill_tokens_per_s:.1f} tokens/s){reused}",
        f"decode: {t.decode_tokens} tokens in {t.decode_seconds:.3f} s "
        f"({t.decode_tokens_per_s:.1f} tokens/s)",
        f"finish reason: {done.finish_reason}",
    ]
    if t.draft_tokens:
        lines.insert(2, f"prompt lookup: {t.accepted_tokens} of {t.draft_tokens} guesses came")
    print("\n".join(lines), file=sys.stderr)


def _score(args: argparse.Namespace) -> None:
    from .generate import score

    text = _read(args.file)
    result = score(_load(args), text, window=args.window)
    print(f"tokens: {len(result.token_ids)}")
    print(f"nll: {result.nll:.6f}")
    print(f"perplexity: {result.perplexity:.4f}")


def _pack(args: argparse.Namespace) -> None:
    from .checkpoint import locate
    from .image import check_output
    from .packing import pack_checkpoint

    output = Path(args.output)
    check_output(output)  # before the work, not after it
    image = pack_checkpoint(*locate(args.model, args.revision), args.format)
    image.save(output)
    print(f"{output}: {image.name}, {image.format}, {output.stat().st_size / 1e6:.1f} MB")


def _info(args: argparse.Namespace) -> None:
    from .cli_info import print_info

    print_info(_load(args))


def _bench(args: argparse.Namespace) -> None:
    from .cli_bench import Plan, measure, print_rows

    if args.device != "cpu":
        raise MobileLLMError(
            f"[bench] device must be 'cpu', got {args.device!r}: GPUs are measured by "
            "pytest bench/ --benchmark-only -m gpu"
        )
    plan = Plan(args.prompt_tokens, args.new_tokens, args.repetitions, args.batch)
    print_rows(measure(_load(args), plan), args.output)


def _read(name: str) -> str:
    """Return the text of a file or of standard input, without a byte order mark."""
    if name == "-":
        return _stdin().buffer.read().decode("utf-8-sig")
    try:
        return Path(name).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MobileLLMError(
            f"{name}: not valid UTF-8 ({error.reason} at byte {error.start})"
        ) from None


def _argument(text: str) -> str:
    """Return a text of the command line, where bytes that Python could not read are surrogates."""
    return text.encode("utf-8", "surrogateescape").decode()


def _stdin() -> TextIO:
    if sys.stdin is None:
        raise MobileLLMError("standard input must be open to read, got a closed one")
    return sys.stdin


def _print_error(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr)


def _discard_unwritable_output() -> None:
    """Stop Python from trying, and failing, to write the rest of the output again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):  # there may be no file behind it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
