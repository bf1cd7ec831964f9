"""The command `python -m mobilellm_fast.train`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MobileLLMError

DESCRIPTION = """\
Train a model from scratch, or on from another, on a text file.

examples:
  python -m mobilellm_fast.train book.txt --out book                  # a tiny model
  python -m mobilellm_fast.train book.txt --out book --resume         # goes on where it was stopped
  python -m mobilellm_fast.train book.txt --out book --set num_hidden_layers=8 layer_sharing=reverse
  python -m mobilellm_fast.train book.txt --out tuned --model DIR --learning-rate 1e-4
  mobilellm-fast generate --model book "It is a truth"

DIR gets checkpoint.pt while training and the whole model, ready to load, at the end; loss.csv and,
with matplotlib, loss.png.
"""

TINY = dict(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0, or 1 after a one-line error, or 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        _train(args)
    except MobileLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    from .recipe import Recipe

    parser = argparse.ArgumentParser(
        prog="python -m mobilellm_fast.train",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", type=Path, help="a UTF-8 text; every 20th piece validates")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt")
    parser.add_argument("--model", help="start from this model's weights and tokenizer")
    parser.add_argument("--preset", help="a published shape, such as MobileLLM-LS-125M")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of MobileLLMConfig"
    )
    parser.add_argument("--vocab-size", type=int, default=2048, help="of a new tokenizer")
    for field in dataclasses.fields(Recipe):
        kind = type(field.default)
        several = {"nargs": 2, "type": float} if kind is tuple else {"type": kind}
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(
            name, default=field.default, help=f"default: {field.default}", **several
        )
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--validate-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", default="cpu", help="of torch, such as cuda")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--checkpoint-activations", action="store_true", help="saves memory")
    return parser


def _train(args: argparse.Namespace) -> None:
    import torch

    from . import Trainer, checkpoints, make_corpus, plot, read_text
    from .recipe import Recipe

    recipe = Recipe(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe)})
    checkpoint = args.out / checkpoints.NAME
    if checkpoint.exists() and not args.resume:
        raise MobileLLMError(f"{checkpoint} is there; --resume goes on from it, or delete it")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(recipe.seed)
    text = read_text(args.text)
    model, tokenizer, template = _model(args, text)
    model.to(args.device)
    model.checkpoint_activations(args.checkpoint_activations)
    trainer = Trainer(
        model,
        make_corpus(text, tokenizer, recipe.seq_len),
        recipe,
        checkpoint,
        resume=args.resume,
        save_every=args.save_every,
        validate_every=args.validate_every,
        compiled=args.compile,
    )
    try:
        with _progress(trainer) as show:
            for state in trainer.run():
                show(state)
    finally:
        plot.write(args.out, trainer.state)
    from ..interchange import save_pretrained

    model.cpu()
    save_pretrained(args.out, model.config, model.weights(), "fp32", tokenizer, template)
    loss = trainer.state.validations[recipe.steps]
    print(f"{args.out}: {model.config.num_parameters} weights, validation loss {loss:.4f}")


def _model(args: argparse.Namespace, text: str) -> tuple[Any, Any, str | None]:
    from ..config import MobileLLMConfig
    from ..model import MobileLLM
    from . import train_tokenizer, write_tokenizer

    if args.model is not None:
        if args.set or args.preset:
            raise MobileLLMError("--model has its own shape: --set and --preset do not apply")
        from ..loading import load

        model = load(args.model, format="fp32").train()
        if model.tokenizer is None:
            raise CheckpointError(f"{args.model}: has no tokenizer")
        return model, model.tokenizer, model.engine.chat_template
    if args.resume and (args.out / "tokenizer.json").exists():
        from ..tokenizer import Tokenizer

        tokenizer = Tokenizer.from_directory(args.out)
    else:
        tokenizer = write_tokenizer(train_tokenizer(text, args.vocab_size), args.out)
    shape = MobileLLMConfig.preset(args.preset).to_hf() if args.preset else TINY
    known = MobileLLMConfig.__dataclass_fields__
    fields = {name: value for name, value in shape.items() if name in known}
    fields |= dict(vocab_size=tokenizer.vocab_size, bos_token_id=0, eos_token_id=0)
    for setting in args.set:
        name, _, value = setting.partition("=")
        if name not in known:
            raise MobileLLMError(f"--set must name a field of MobileLLMConfig, got {name!r}")
        fields[name] = _value(value)
    if "initializer_range" not in fields:
        # 0.02 is the paper's at a width of 576; a narrower model needs wider weights
        fields["initializer_range"] = 0.02 * (576 / fields["hidden_size"]) ** 0.5
    return MobileLLM(MobileLLMConfig(**fields)), tokenizer, None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class _progress:
    """A progress bar; `with` gives a function that takes each state."""

    def __init__(self, trainer: Any) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._trainer = trainer
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )

    def __enter__(self) -> Any:
        self._bar.start()
        state, steps = self._trainer.state, self._trainer.recipe.steps
        self._task = self._bar.add_task("training", total=steps, completed=state.step)
        return self._show

    def __exit__(self, *exception: Any) -> None:
        self._bar.stop()

    def _show(self, state: Any) -> None:
        text = f"loss {state.losses[-1]:.3f}"
        if state.validations:
            text += f", validation {list(state.validations.values())[-1]:.3f}"
        self._bar.update(self._task, completed=state.step, description=text)


if __name__ == "__main__":
    sys.exit(main())
