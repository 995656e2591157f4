"""The text of single tokens, as they stand in a text, and what kind of token that makes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_BEFORE = 4
"""Tokens before one that are read with it: what a tokenizer makes of a token can depend on the one
before it, and a letter can have four tokens."""
_CUT = "\ufffd"
"""Of a letter whose last bytes are in tokens to come."""

KINDS = ("word start", "word inside", "number", "punctuation", "white space", "other")
"""Kinds of tokens, by their text alone, whatever the tokenizer: see ``kind``."""


def text_after(tokenizer: Any, before: Sequence[int], tokens: Sequence[int], **how: Any) -> str:
    """The text that ``tokens`` add after ``before``, of which the last few are looked at."""
    known = _decoded(tokenizer, before[-_BEFORE:], **how).rstrip(_CUT)
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


def kind(piece: str) -> str:
    """Which of ``KINDS`` the text of a token is.

    White space: nothing else in it. Number: a digit in it, and no letter. Word start: letters after
    white space, or in the upper case; word inside: letters without either. Punctuation: anything
    else that can be seen. Other: what cannot, a part of a letter or nothing.
    """
    bare = piece.strip()
    if not bare:
        return "white space" if piece else "other"
    if _CUT in bare:
        return "other"
    if re.search(r"[^\W\d_]", bare):
        starts = piece[0].isspace() or bare[0].isupper()
        return "word start" if starts else "word inside"
    if re.search(r"\d", bare):
        return "number"
    return "punctuation"


def _decoded(tokenizer: Any, tokens: Sequence[int], **how: Any) -> str:
    if not tokens:
        return ""
    text: str = tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False, **how)
    return text
