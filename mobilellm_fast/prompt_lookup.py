"""Drafts for speculative decoding, looked up in the text so far (Saxena 2023).

Where a text repeats what it or its prompt said before, the next tokens are guessed from there. The
model then checks all guesses in one step, which costs little more than a step for one token.
"""

from __future__ import annotations

from collections.abc import Iterable


class PromptLookup:
    """Finds what followed the last tokens of a text when they came before.

    Args:
        token_ids: the text so far.
        ngram: how many of the last tokens to look for, at least 1; where so many did not come
            before, fewer are tried, but not one alone, after which anything may follow.
    """

    def __init__(self, token_ids: Iterable[int], ngram: int) -> None:
        self._sizes = range(ngram, min(ngram, 2) - 1, -1)
        self._token_ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # where a text goes on after its last tokens
        for token_id in token_ids:
            self.push(token_id)

    def push(self, token_id: int) -> None:
        """Take the next token of the text."""
        at = len(self._token_ids)
        for size in self._sizes:
            if size <= at:
                self._next[tuple(self._token_ids[at - size :])] = at
        self._token_ids.append(token_id)

    def draft(self, count: int) -> list[int]:
        """Guess up to `count` next tokens; what repeats is taken to go on repeating."""
        for size in self._sizes:
            at = self._next.get(tuple(self._token_ids[-size:]))
            if at is not None:
                found = self._token_ids[at : at + count]
                return [found[i % len(found)] for i in range(count)]
        return []
