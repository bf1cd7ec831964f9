"""Trains tiny models of equal size on one text: depth, layer sharing, tied embeddings.

    python bench/training_text.py austen.txt
    python bench/train_experiments.py austen.txt --out runs      # resumes where it was stopped
    python bench/train_experiments.py --report runs              # the tables of docs/training.md

Every variant has the recipe, the tokenizer and the batches of every other; three seeds draw the
weights and the batches. Weights held are equal within 1%, except where sharing adds passes: there
they are the same weights, run twice.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from mobilellm_fast import MobileLLM, MobileLLMConfig
from mobilellm_fast.files import whole_file
from mobilellm_fast.train import (
    Recipe,
    Trainer,
    make_corpus,
    read_text,
    train_tokenizer,
    write_tokenizer,
)

SEEDS = (0, 1, 2)
RECIPE = Recipe(steps=450, batch_size=8, seq_len=128, learning_rate=4e-3, warmup_steps=50)
COMMON = dict(vocab_size=512, max_position_embeddings=256, bos_token_id=0, eos_token_id=0)
DEEP = COMMON | dict(
    hidden_size=64,
    initializer_range=0.48 * 64**-0.5,  # as 0.02 is at the paper's width of 576
    intermediate_size=172,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
WIDE = COMMON | dict(
    hidden_size=88,
    initializer_range=0.48 * 88**-0.5,
    intermediate_size=257,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
VARIANTS = {
    "deep and thin: 4 blocks of 64": DEEP,
    "wide and shallow: 2 blocks of 88": WIDE,
    "each block twice, immediate": DEEP | {"layer_sharing": "immediate"},
    "each block twice, repeat-all-over": DEEP | {"layer_sharing": "repeat_all"},
    "each block twice, reverse": DEEP | {"layer_sharing": "reverse"},
    # the head's weights are taken from the blocks' feed-forward layers
    "untied head": DEEP | {"tie_word_embeddings": False, "intermediate_size": 129},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--report", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.report:
        report(args.report)
        return
    if args.text is None:
        parser.error("text is missing")
    torch.set_num_threads(args.threads)
    text = read_text(args.text)
    tokenizer = write_tokenizer(train_tokenizer(text, COMMON["vocab_size"]), args.out / "tokenizer")
    corpus = make_corpus(text, tokenizer, RECIPE.seq_len)
    # seed by seed, so that an early stop leaves whole comparisons
    for seed in SEEDS:
        for name, fields in VARIANTS.items():
            run(name, fields, seed, corpus, args.out)


def run(name: str, fields: dict, seed: int, corpus, out: Path) -> None:
    """Train one variant, unless its result is there."""
    stem = f"{name.replace(' ', '-').replace(':', '').replace(',', '')}-{seed}"
    result, checkpoint = out / f"{stem}.json", out / f"{stem}.pt"
    if result.exists():
        return
    torch.manual_seed(seed)
    model = MobileLLM(MobileLLMConfig(**fields))
    recipe = dataclasses.replace(RECIPE, seed=seed)
    trainer = Trainer(model, corpus, recipe, checkpoint, resume=checkpoint.exists())
    started = time.process_time()
    for _ in trainer.run():
        pass
    found = {
        "variant": name,
        "seed": seed,
        "config": model.config.to_hf(),
        "recipe": dataclasses.asdict(recipe),
        "parameters": model.config.num_parameters,
        "validations": trainer.state.validations,
        "losses": trainer.state.losses,
        "cpu_seconds": time.process_time() - started,
    }
    with whole_file(result) as file:
        file.write(json.dumps(found).encode())
    checkpoint.unlink()
    print(f"{stem}: {trainer.state.validations} in {found['cpu_seconds']:.0f} s", file=sys.stderr)


def report(out: Path) -> None:
    """Print a Markdown table of all results."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    last = {}
    for result in results:
        steps = str(result["recipe"]["steps"])
        last.setdefault(result["variant"], {})[result["seed"]] = result["validations"][steps]
    parameters = {result["variant"]: result["parameters"] for result in results}
    base = last[next(iter(VARIANTS))]
    print("| variant | weights | seeds | validation loss | lowest to highest | against the first |")
    print("|---|---|---|---|---|---|")
    for name in VARIANTS:
        if name not in last:
            continue
        losses = last[name]
        differences = [losses[seed] - base[seed] for seed in losses.keys() & base.keys()]
        mean, low, high = (f(losses.values()) for f in (statistics.mean, min, max))
        print(
            f"| {name} | {parameters[name]} | {len(losses)} "
            f"| {mean:.3f} | {low:.3f} to {high:.3f} "
            f"| {min(differences):+.3f} to {max(differences):+.3f} |"
        )


if __name__ == "__main__":
    main()
