"""Training from scratch or on from a model, with MobileLLM's recipe.

    python -m mobilellm_fast.train TEXT --out DIR

Needs torch. `Trainer` is the loop, `Recipe` its hyperparameters, `Corpus` the text.
"""

from .recipe import Recipe
from .text import Corpus, make_corpus, read_text, train_tokenizer, write_tokenizer
from .trainer import Trainer

__all__ = [
    "Corpus",
    "Recipe",
    "Trainer",
    "make_corpus",
    "read_text",
    "train_tokenizer",
    "write_tokenizer",
]
