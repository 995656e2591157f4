"""Tables as Markdown and as LaTeX: texts in, text out, nothing in them read as markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_LATEX = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "{}_%&#$"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\u00d7": r"$\times$",
    "\u2212": "$-$",
}


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of plain texts; ``plain`` keeps each in its field."""
    return "\n".join(lines(headings, [list(map(plain, row)) for row in rows]))


def lines(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table whose entries are Markdown already."""
    every = [list(headings), ["---"] * len(headings), *rows]
    return [f"| {' | '.join(line)} |" for line in every]


def plain(text: str) -> str:
    """Text as Markdown that stays in its field: no line breaks, no bars, no markup."""
    text = " ".join(str(text).split())
    for letter in "\\|*`":
        text = text.replace(letter, f"\\{letter}")
    return text.replace("<", "&lt;").replace("](", "]\\(")


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(str(text).split()))


def latex_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Sequence[bool],
    caption: str,
    label: str,
    groups: Sequence[object] = (),
) -> str:
    """A LaTeX table with the rules of ``booktabs``, from plain texts.

    ``left``: by column, whether it stands on the left; ``groups``: by row, with a rule where it
    changes.
    """
    columns = "".join("l" if one else "r" for one in left)
    body = []
    for place, row in enumerate(rows):
        if place and groups and groups[place] != groups[place - 1]:
            body.append(r"\midrule")
        body.append(f"{' & '.join(map(escaped, row))} \\\\")
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{escaped(caption)}}}",
            f"\\label{{{label}}}",
            f"\\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"\toprule",
            f"{' & '.join(map(escaped, headings))} \\\\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )
