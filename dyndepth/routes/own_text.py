"""A text of one's own: read from a file, standard input or the command line, continued by the
model, and its route in a few lines for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.common.errors import UserError
from dyndepth.common.files import paragraphs, read_text
from dyndepth.common.paths import path_of

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod
    from dyndepth.routes.trace import Routes

STDIN = "-"
SHADES, PLAIN_SHADES = "·░▒▓█", ".-+*#"
"""Of blocks that no token executed, some, about half, most, all; and for terminals without them."""
_MOST_CELLS = 60
"""Blocks that a line shows one by one."""
_TOKENS_TOLD = 3


def own_texts(file: str | None, words: str | None) -> dict[str, str]:
    """Document id -> text: the parts of a file between blank lines (``-``: of standard input), or
    ``words`` as one.

    Raises UserError for both at once, a file that can't be read, or no text at all.
    """
    if words is not None:
        if file is not None:
            raise UserError("--prompt and --text both say what is recorded; give one of them")
        name, parts = "prompt", [words]
    elif file == STDIN:
        name, parts = "stdin", paragraphs(_standard_input())
    else:
        path = path_of(file or "")
        name, parts = path.name, paragraphs(_content(path))
    found = [text.strip() for text in parts if text.strip()]
    if not found:
        raise UserError(f"{'--prompt' if words is not None else f'--text {file}'} holds no text")
    return {f"{name}/{index}": text for index, text in enumerate(found)}


def _content(file: Path) -> str:
    try:
        return read_text(file, f"--text {file}")
    except OSError as fault:
        raise UserError(f"--text {file} can't be read: {fault.strerror}") from None


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise UserError("--text - is not UTF-8 text; convert it first") from None


def continued(
    model: Any,
    tokenizer: Any,
    method: DynamicDepthMethod,
    texts: Mapping[str, str],
    length: int | None,
    count: int,
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Token ids of each text, cut at ``length`` tokens, and of the ``count`` tokens, or fewer, that
    ``method``, fitted, writes after it, greedily; and how many tokens the text itself has.

    Raises UserError where the model has no room for them.
    """
    import torch

    from dyndepth.data.capacity import check_tokens, longest
    from dyndepth.runtime.attach import attach

    found, own = {}, {}
    device, most = next(model.parameters()).device, longest(model)
    for document, text in texts.items():
        ids = tokenizer([text], verbose=False)["input_ids"][0][:length]
        if most is not None and len(ids) + count > most:
            raise UserError(
                f"document {document!r} has {len(ids)} tokens, which leaves no room for {count} "
                f"more in the {most} that the model takes; give less --length or --generate"
            )
        if not ids:
            raise UserError(f"document {document!r} has no tokens; leave it out")
        check_tokens(model, ids, f"document {document!r}")
        asked = torch.tensor([ids], device=device)
        with torch.no_grad(), attach(model, method, documents=[document]):
            written = model.generate(
                asked,
                attention_mask=torch.ones_like(asked),
                max_new_tokens=count,
                do_sample=False,
                num_beams=1,
                pad_token_id=tokenizer.eos_token_id,
            )
        found[document], own[document] = written[0].tolist(), len(ids)
    return found, own


def shaded(routes: Routes, document: str, shades: str = SHADES) -> list[str]:
    """The route of one document in lines of at most 80 columns: for attention and MLP a mark a
    block (``shades``: from no token to all), and the tokens that execute least and most."""
    import numpy as np

    from dyndepth.method import SUBLAYERS  # it loads torch

    rows = routes.document(document)
    gates = routes.gates[rows]
    lines = [f"{document}: {len(gates)} tokens, {gates.mean():.0%} of sublayers executed"]
    layers = gates.shape[1]
    groups = np.array_split(np.arange(layers), min(layers, _MOST_CELLS))
    for index, kind in enumerate(SUBLAYERS):
        shares = [float(gates[:, group, index].mean()) for group in groups]
        marks = "".join(_shade(share, shades) for share in shares)
        lines.append(f"  {kind:9} {marks} {gates[:, :, index].mean():4.0%}")
    of_token = gates.mean((1, 2))
    if of_token.min() < of_token.max():
        order, texts = np.argsort(of_token, kind="stable"), routes.strings(rows)
        for name, chosen in (("least", order), ("most", order[::-1])):
            told = [f"{_told(texts[i], shades)} {of_token[i]:.0%}" for i in chosen[:_TOKENS_TOLD]]
            lines.append(f"  {name:9} {', '.join(told)}")
    return lines


def legend(layers: int, shades: str = SHADES) -> str:
    """What the marks of ``shaded`` mean."""
    said = ("no token", "some", "half", "most", "all")
    marks = ", ".join(f"{shade} {text}" for shade, text in zip(shades, said, strict=True))
    return f"from left to right blocks 0 to {layers - 1}; executed by: {marks}"


def usable_shades(encoding: str | None) -> str:
    """``SHADES`` where a terminal of that encoding can write them, else plain letters."""
    try:
        SHADES.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN_SHADES
    return SHADES


def _shade(share: float, shades: Sequence[str]) -> str:
    if share in (0.0, 1.0):
        return shades[-1] if share else shades[0]
    return shades[1 + min(2, int(3 * share))]


def _told(token: str, shades: str) -> str:
    """A token's text, quoted and short; in ASCII for terminals that have no more."""
    text = token if len(token) <= 12 else f"{token[:11]}..."
    return ascii(text) if shades == PLAIN_SHADES else repr(text)
