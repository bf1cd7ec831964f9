"""Which characters are letters, numbers and white space for the `tokenizers` library.

Its regular expressions and its `Digits` come from two libraries with their own versions of
Unicode, neither of which needs to be Python's; so we ask them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .table import BLANK, CODE_POINTS, CUT_DIGIT, LETTER, NUMBER

# Where Unicode has letters, numbers or white space, or may get some: all but reserved and private
# planes. The surrogates are no characters.
ASKED = (range(0xD800), range(0xE000, 0x34000), range(0xE0000, 0xE1000))
SEPARATOR = "\x01"  # in no class


@lru_cache(maxsize=2)
def character_classes(digits: str | None) -> np.ndarray:
    """Return a byte of flags for each code point.

    Args:
        digits: what cuts digits out: "Digits", the pre-tokenizer, "regex", \\p{N}, or None.
    """
    from tokenizers import Regex, pre_tokenizers

    def split(regex: str):
        return pre_tokenizers.Split(Regex(regex), "isolated")

    codes = np.concatenate([np.arange(part.start, part.stop) for part in ASKED])
    text = "".join(map(chr, codes.tolist()))
    # Runs of one class; then one character stands for all of its run.
    kinds = [(split(r"\p{L}"), LETTER), (split(r"\p{N}"), NUMBER), (split(r"\s"), BLANK)]
    classes = _flags(split(r"\p{L}+|\p{N}+|\s+"), kinds, codes, text)
    if digits == "regex":
        classes[classes == NUMBER] |= CUT_DIGIT
    elif digits == "Digits":
        contiguous = pre_tokenizers.Digits(individual_digits=False)
        single = pre_tokenizers.Digits(individual_digits=True)
        classes |= _flags(contiguous, [(single, CUT_DIGIT)], codes, text)
    classes.flags.writeable = False  # it is shared
    return classes


def _flags(runs, kinds, codes: np.ndarray, text: str) -> np.ndarray:
    starts = [start for _, (start, _) in runs.pre_tokenize_str(text)]
    sample = SEPARATOR.join(text[start] for start in starts)
    of_run = np.zeros(len(starts), np.uint8)
    for pre_tokenizer, flag in kinds:
        for _, (start, end) in pre_tokenizer.pre_tokenize_str(sample):
            if end - start == 1 and start % 2 == 0:  # cut out from between two separators
                of_run[start // 2] |= flag
    classes = np.zeros(CODE_POINTS, np.uint8)
    classes[codes] = np.repeat(of_run, np.diff([*starts, len(text)]))
    return classes
