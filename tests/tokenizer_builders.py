"""Small tokenizers of every family, and texts to try them on."""

import functools
import io
import json
import pydoc_data.topics

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Reference

pytest.importorskip("sentencepiece")
import sentencepiece

from mobilellm_fast.checkpoint.gguf_file import Metadata
from mobilellm_fast.tokenizer.backends import parse_model

TEXTS = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces,   three\t\ttabs",
    "12345 and 3.14159, 1,000,000",
    "don't we'll I'VE they'd o'clock O'REILLY 'SINCE 'tis",
    "naïve café, Ünïcödé, Straße",
    "日本語のテキスト 中文 한국어",
    "Привет, мир! Γειά σου",
    "مرحبا 123 שלום",
    "😀 👨‍👩‍👧 🇫🇷 emoji",
    "def f(x):\n    return x ** 2  # ok\n\n\n",
    "\r\n\r\n \n  \n x",
    "a\u0301 \u200b \ufeff \x01 \x7f",
    "https://example.org/a?b=1&c=%20#d",
    "{}[]()<>|\\/~`!@#$%^&*-_=+;:'\",.?",
    "CamelCase snake_case SCREAMING_CASE",
    "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|> <|unknown|>",
    "<s>begin</s> <s> again <unk>",
    "<s>begin</s><s>again<unk>x",
    "see file://a//b/.//\n/c/ (or ...\n\n/d)",
    "x" * 200 + " " * 50 + "\n" * 20,
]
CORPUS = "\n".join(pydoc_data.topics.topics.values())
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def metadata(**fields) -> Metadata:
    return Metadata({f"tokenizer.ggml.{name}": value for name, value in fields.items()})


# How the models that use them write their pre-tokenizers in tokenizer.json.
GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BYTES_ONLY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_REGEX = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(regex: str):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), BYTES_ONLY])


PRE_TOKENIZERS = {
    "gpt-2": GPT2_SPLIT,
    "default": GPT2_SPLIT,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_SPLIT]),
    "llama-bpe": split(LLAMA3_REGEX),
    "qwen2": split(QWEN2_REGEX),
    "tekken": split(TEKKEN_REGEX),
}


@functools.cache
def byte_level_model() -> str:
    """Merges learned from whole texts: they would join any words that are not kept apart."""
    tokenizer = Reference(models.BPE())
    tokenizer.pre_tokenizer = BYTES_ONLY
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=CONTROLS,
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS[:2000], *TEXTS * 20], trainer)
    return tokenizer.to_str()


def byte_level_metadata(name: str, tokenizer: Reference, **changes) -> Metadata:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    fields = dict(
        model="gpt2",
        pre=name,
        tokens=tokens,
        token_type=np.array([3 if token in CONTROLS else 1 for token in tokens]),
        merges=[" ".join(pair) for pair in model["merges"]],
        bos_token_id=tokens.index("<|im_start|>"),
        eos_token_id=tokens.index("<|im_end|>"),
        add_bos_token=False,
    )
    return metadata(**fields | changes)


@functools.cache
def sentencepiece_model(kind: str = "bpe") -> bytes:
    """A model with the settings of Llama's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()[:3000]),
        model_writer=model,
        model_type=kind,
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


def sentencepiece_metadata(**changes) -> Metadata:
    """The metadata llama.cpp's converter makes of a `tokenizer.model`."""
    pieces = parse_model(sentencepiece_model()).pieces
    fields = dict(
        model="llama",
        tokens=[piece.piece for piece in pieces],
        scores=np.array([piece.score for piece in pieces], np.float32),
        token_type=np.array([piece.type for piece in pieces], np.int32),
        bos_token_id=1,
        eos_token_id=2,
    )
    return metadata(**fields | changes)
