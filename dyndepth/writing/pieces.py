"""The text of single tokens, as they stand in a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BEFORE = 4
"""Tokens before one that are read with it: what a tokenizer makes of a token can depend on the one
before it, and a letter can have four tokens."""
CUT = "\ufffd"
"""Of a letter whose last bytes are in tokens to come."""


def text_after(tokenizer: Any, before: Sequence[int], tokens: Sequence[int], **how: Any) -> str:
    """The text that ``tokens`` add after ``before``, of which the last few are looked at."""
    known = _decoded(tokenizer, before[-_BEFORE:], **how).rstrip(CUT)
    both = _decoded(tokenizer, [*before[-_BEFORE:], *tokens], **how)
    return both[len(known) :] if both.startswith(known) else _decoded(tokenizer, tokens, **how)


def pieces(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> tuple[str, ...]:
    """What each of ``tokens`` adds to the text after ``before``. A letter in several tokens stands
    at the last of them, the others are ``�``."""
    ids = [*before[-_BEFORE:], *tokens]
    first = len(ids) - len(tokens)
    return tuple(
        text_after(tokenizer, ids[max(0, place - _BEFORE) : place], [ids[place]])
        for place in range(first, len(ids))
    )


def _decoded(tokenizer: Any, tokens: Sequence[int], **how: Any) -> str:
    if not tokens:
        return ""
    text: str = tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False, **how)
    return text
