"""Text from tokens as they come: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are not (yet) UTF-8
CONTEXT_TOKENS = 16  # the longest character is 4 bytes; the rest allows for invisible tokens


class TextStream:
    """Turns one sequence's tokens into text that can be shown at once.

    Args:
        tokenizer: anything with `decode(ids) -> str`, or None: then all text is empty. May have
            `detokenizer(context)`, see `detokenizer`.
        context: tokens the text continues, so that a first word keeps the space before it.
        stop: strings to stop at; the text ends before the one that is complete first.
    """

    def __init__(self, tokenizer, context: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._detokenizer = None if tokenizer is None else detokenizer(tokenizer, context)
        self._scanner = StopScanner(stop) if stop else None  # its call costs 35 us after a step

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._scanner is not None and self._scanner.found

    def push(self, token_id: int) -> str:
        """Take the next token, return the text that is certain now (often, but not always, its)."""
        text = self._detokenizer.push(token_id) if self._detokenizer else ""
        return self._scanner.push(text) if self._scanner else text

    def finish(self) -> str:
        """Return what was still held back, when no more tokens will come."""
        rest = self._detokenizer.finish() if self._detokenizer else ""
        return self._scanner.push(rest) + self._scanner.finish() if self._scanner else rest


def detokenizer(tokenizer, context: Sequence[int]):
    """Return what decodes a sequence's tokens one by one: the tokenizer's own, if it has one.

    A compiled tokenizer has one in C++. A step reads hundreds of megabytes and leaves nothing of
    Python in the caches: a call after it takes 43 us with `Detokenizer`, 14 us in C++.
    """
    make = getattr(tokenizer, "detokenizer", None)
    own = make(context[-CONTEXT_TOKENS:]) if make else None
    return Detokenizer(tokenizer, context) if own is None else own


class Detokenizer:
    """Decodes tokens one by one; the pieces join to the text of all tokens decoded together.

    A token alone cannot be decoded: it may end inside a character, and SentencePiece drops the
    space before the first word. So each new token is decoded together with a few before it, and
    what is not shown yet of that text is shown, but for an unfinished character at its end.
    """

    def __init__(self, tokenizer, context: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._lengths: dict[tuple[int, ...], int] = {}
        # Tokens shown last, beginning with a whole character, then those not shown in full.
        self._window: list[int] = []
        self._shown_tokens = 0
        self._shown_characters = 0
        for length in range(1, min(len(context), CONTEXT_TOKENS) + 1):
            text = self._decode(list(context[-length:]))
            if text and REPLACEMENT not in text:
                self._window = list(context[-length:])
                self._shown_tokens, self._shown_characters = length, len(text)
                break

    def push(self, token_id: int) -> str:
        """Take the next token, return the text that it completes."""
        self._window.append(token_id)
        text = self._decode(self._window)
        new = text.rstrip(REPLACEMENT)[self._shown_characters :]
        self._shown_characters += len(new)
        # Where no character is open the window moves on, unless to invisible tokens only: they
        # would make the next word the first of its text.
        if new and not text.endswith(REPLACEMENT):
            del self._window[: self._shown_tokens]
            self._shown_tokens = len(self._window)
            self._shown_characters = self._length(tuple(self._window))
        return new

    def _length(self, token_ids: tuple[int, ...]) -> int:
        """Return how many characters tokens are alone; words come again, so it is remembered."""
        length = self._lengths.get(token_ids)
        if length is None:
            length = self._lengths[token_ids] = len(self._decode(list(token_ids)))
        return length

    def finish(self) -> str:
        """Return what is left: an unfinished character, as U+FFFD."""
        return self._decode(self._window)[self._shown_characters :]


class StopScanner:
    """Passes text on up to the first stop string, holding back what may be the start of one.

    Where stop strings overlap, the one that is complete first wins: the result does not depend
    on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take the next text, return what cannot belong to a stop string; nothing after one."""
        if self.found:
            return ""
        text = self._held + text
        matches = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        self.found = bool(matches)
        safe = min(matches)[1] if matches else len(text) - self._longest_start(text)
        self._held = "" if matches else text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """Return what was held back, when no more text will come."""
        rest, self._held = self._held, ""
        return rest

    def _longest_start(self, text: str) -> int:
        """Return how many characters at the end of the text could begin a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stop):
                return length
        return 0
