"""Texts on which a compiled tokenizer must equal the library's before it is used."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

FIXED = [
    "",
    " ",
    "  ",
    "\n",
    "a",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces,   three\t\ttabs \t mixed",
    "12345 and 3.14159, 1,000,000 x2y33z444",
    "don't we'll I'VE they'd o'clock O'REILLY 'SINCE 'tis 'RE 'lL '\u017ftop '' 's",
    "na\u00efve caf\u00e9, \u00dcn\u00efc\u00f6d\u00e9, Stra\u00dfe e\u0301 a\u0308",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \u4e2d\u6587 \ud55c\uad6d\uc5b4",
    "\u3000 \uff11\uff12",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5",
    "\u0645\u0631\u062d\u0628\u0627 123 \u0663\u0664",
    "\u05e9\u05dc\u05d5\u05dd \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "\u2764\ufe0f\U0001f44d\U0001f3fd",
    "\u00bd \u00b2\u00b3 \u2167 \u4e09 \U0001d7ce\U0001d400",
    "def f(x):\n    return x ** 2  # ok\n\n\n\tpass\r\n",
    "\r\n\r\n \n  \n x\n\n y\r z \n",
    "\u200b\ufeff\x00\x01\x7f\x85\xa0\u2028\u2029\ufffd\ufffe\U0010ffff\ue000\u0378",
    "https://example.org/a?b=1&c=%20#d",
    "{}[]()<>|\\/~`!@#$%^&*-_=+;:'\",.?",
    "CamelCase snake_case SCREAMING_CASE",
    "\u2581a \u2581 b\u2581\u2581c",
    "<0x41><0x0A> <unk> <s> </s> <|im_start|>user\n<|endoftext|>",
    "x" * 300 + " " * 70 + "\n" * 30 + "\t" * 5 + "\u00e9" * 40 + "=" * 90 + "7" * 25,
]

# Words, characters of many scripts, white space, marks: what random texts are made of.
PARTS = [
    *"abcdefghij XYZ 0123456789 .,;:!?'\"-_()/\\<>|@#",
    *(" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2003", "\x85"),
    *("the", "The", " and", " of", "ing", "tion", "'s", "'LL", "don't", "int", "return", "2024"),
    *"\u00e9\u00fc\u00df\u017f\u0130\u0131\u01c5\u02b0\u00aa\u0301\u0308\u093e\u0903\u20dd\u200d\ufe0f",
    *"\u0436\u03a9\u05d0\u0639\u0928\u0e01\u1200\u3042\u30a2\u4e00\u9fff\uac00\ud7a3\uff21\U00020000",
    *"\u0663\u0967\u00bd\u00b2\u2167\u3007\U0001d7d8\u2460",
    *"\U0001f600\U0001f468\U0001f3fd\U0001f1e9\u20ac\u2014\u2026\u201c\u2581\u2580\ufffd\x00\x1f\u200b",
    *("\ue000", "\U0010ffff", "\ufdd0", "\u0378", "\ufeff", "<0x41>", "<s>", "<unk>", "<|", "|>"),
]


def probe_texts(added: Sequence[str], count: int = 300, seed: int = 0) -> list[str]:
    """Return the fixed texts and `count` random ones, with the added tokens embedded.

    Args:
        added: texts of the tokenizer's added tokens.
        seed: the same seed gives the same texts.
    """
    rng = random.Random(seed)
    texts = list(FIXED)
    for token in added[:50]:
        texts += [token, f"a{token}b", f" {token} {token}\n", f"{token[:-1]}{token}{token[1:]}"]
    parts = PARTS + rng.choices(added, k=12) if added else PARTS
    for _ in range(count):
        texts.append("".join(rng.choices(parts, k=rng.randrange(1, 40))))
    return texts


def probe_ids(
    vocab_size: int, marked: Sequence[int], count: int = 200, seed: int = 0
) -> Iterator[list[int]]:
    """Yield random sequences of ids, in half of them many of `marked`: bytes, special tokens."""
    rng = random.Random(seed)
    for _ in range(count if vocab_size else 0):
        pool = marked if marked and rng.random() < 0.5 else range(vocab_size)
        length = rng.randrange(1, 12)
        yield [rng.choice(pool if rng.random() < 0.8 else range(vocab_size)) for _ in range(length)]
