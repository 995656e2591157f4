"""Markdown from rows of texts and from docstrings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dyndepth.common.markup import lines

_SECTION = re.compile(r"([A-Z][A-Za-z]*(?: [a-z]+){0,4}(?: \([^)]*\))?): ?(.*)")
_CODE = re.compile(r"``(.+?)``", re.DOTALL)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar or a line break in an entry would end its cell and is replaced."""
    return "\n".join(lines(list(map(_cell, headings)), (list(map(_cell, row)) for row in rows)))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def joined(texts: Iterable[str]) -> str:
    """The different ones of ``texts``, in order, as a person lists them: ``a, b and c``."""
    found = list(dict.fromkeys(texts))
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def layout(text: str) -> str:
    """The rest of a module's docstring as Markdown: a paragraph for each ``Label:``, lists for
    indented definitions, code for other indented lines."""
    blocks: list[list[str]] = []
    before = ""
    for line in text.splitlines():
        form = _form(line, before)
        section = _SECTION.fullmatch(line)
        if not line.strip():
            before = ""
            continue
        if form == "text" and section:
            blocks.append([f"**{section[1]}:**", section[2]])
        elif form == "more":
            blocks[-1].append(line.strip())
        elif form == "item":
            blocks.append([f"- {line.strip()}"])
        elif form == "code" and before == "code":
            blocks[-1].append("\n" + line)
        elif form != before or not blocks:
            blocks.append(["\n" * (form == "code") + line if form == "code" else line.strip()])
        else:
            blocks[-1].append(line.strip())
        before = "item" if form == "more" else form
    return "\n\n".join(_paragraph(block) for block in blocks)


def _form(line: str, before: str) -> str:
    """text, item (an indented definition), more (of an item), or code."""
    if not line.startswith("    "):
        return "text"
    if line.strip().startswith("``"):
        return "item"
    return "more" if before == "item" and line.startswith("        ") else "code"


def _paragraph(block: list[str]) -> str:
    if block[0].startswith("\n"):
        lines = [line.strip("\n")[4:] for line in block]
        return "\n".join(["```text", *lines, "```"])
    return markup(" ".join(filter(None, block)))


def markup(text: str) -> str:
    """A docstring's text as Markdown: its literals as code, what Markdown would read escaped."""
    pieces = _CODE.split(text)
    # Odd pieces are literals, in which nothing is markup.
    return "".join(
        f"`{piece}`" if place % 2 else piece.replace("<", "&lt;")
        for place, piece in enumerate(pieces)
    )
