"""``python -m dyndepth.pages``: writes what the pages say of methods, tables and results.

It writes a card for each method and their index (``docs/methods/``), the reference of the tables
(``docs/tables.md``), what was run on GPUs (``docs/gpu_status.md``), the pictures that pages ask
for, and the parts of README.md, docs/*.md and results/README.md that stand between ``<!--
generated: NAME ... -->`` and ``<!-- end -->``. Every number there comes from the committed tables.
``--check`` writes nothing and names what differs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyndepth.common.commands import Parser, run
from dyndepth.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("results/embedded")
COMMAND = "`make docs`"

_MARKER = re.compile(r"<!-- generated: *(\w+)(.*?)-->\n(.*?)(<!-- end -->)", re.DOTALL)
_OPEN = re.compile(r"<!-- generated:")
FIGURE = "figure"
"""The block that is a picture; its file is written, too."""


def pages(root: Path = ROOT, results: Path = RESULTS) -> dict[Path, str]:
    """Every file that is written, in part or in whole: path relative to ``root`` -> its text.

    ``results`` is the main run's folder, relative to ``root``.

    Raises:
        UserError: a page asks for a block that there is none of, or a table is not as it should be.
    """
    from dyndepth.pages.blocks import Source
    from dyndepth.pages.gpus import PAGE, status_page

    source = Source(root, results)
    found = cards(source) | {Path("docs/tables.md"): table_reference()}
    found[PAGE] = f"{_written()}\n\n{status_page(source)}"
    kept = [Path("README.md"), Path("results/README.md")]
    kept += sorted(path.relative_to(root) for path in (root / "docs").glob("*.md"))
    for path in kept:
        if path not in found and (root / path).is_file():
            found[path] = filled((root / path).read_text(encoding="utf-8"), path, source)
    return found


def filled(text: str, path: Path, source: Any) -> str:
    """``text`` with every generated block written anew.

    Raises:
        UserError: a marker that can't be read, has no end or names no block.
    """
    from dyndepth.pages.blocks import BLOCKS
    from dyndepth.pages.drafts import acceptances, predictions
    from dyndepth.pages.figures import figure
    from dyndepth.pages.gpus import sentence

    blocks = BLOCKS | {"gpu": sentence, FIGURE: figure}
    blocks |= {"acceptances": acceptances, "predictions": predictions}

    def block(match: re.Match[str]) -> str:
        name, written = match[1], match[2]
        if name not in blocks:
            raise UserError(f"{path} asks for the block {name!r}; there is {', '.join(blocks)}")
        options = _options(path, name, written)
        try:
            made = blocks[name](source, options)
        except KeyError as fault:
            raise UserError(f"{path}: the block {name!r} needs {fault} among its options") from None
        return f"<!-- generated: {name}{written}-->\n{made}\n{match[4]}"

    if len(_OPEN.findall(text)) != len(_MARKER.findall(text)):
        raise UserError(f"{path} has a generated block that can't be read or has no <!-- end -->")
    return _MARKER.sub(block, text)


def _options(path: Path, name: str, written: str) -> dict[str, Any]:
    """What stands behind a block's name, as YAML."""
    import yaml

    try:
        options = yaml.safe_load(written) or {}
    except yaml.YAMLError as fault:
        raise UserError(f"{path}: the options of {name!r} are not YAML: {fault}") from None
    if not isinstance(options, dict):
        raise UserError(f"{path}: the options of {name!r} must map names to values")
    return options


def pictures(root: Path, results: Path, found: dict[Path, str]) -> list[Any]:
    """Every ``Picture`` that the pages ask for, if the main run has what they are drawn from."""
    from dyndepth.pages.blocks import Source
    from dyndepth.pages.figures import Picture, drawable

    source = Source(root, results)
    if not drawable(source):
        return []
    return [
        Picture(source, _options(path, FIGURE, match[2]))
        for path, text in found.items()
        for match in _MARKER.finditer(text)
        if match[1] == FIGURE
    ]


def cards(source: Any) -> dict[Path, str]:
    """The methods' pages and their index."""
    from dyndepth.pages.blocks import method_classes, methods
    from dyndepth.pages.cards import card, study_rows
    from dyndepth.results.published import published

    measured = source.rows(source.results, "leaderboard.csv")
    reported = published()
    studies = study_rows(source.root, source.results)
    folder = Path("docs/methods")
    found = {}
    for cls in method_classes():
        own = [row for row in measured if row["method"] == cls.name]
        theirs = [row for row in reported if row["method"] == cls.name]
        where = f"Rows of `{source.results}/leaderboard.csv`; brackets are 95% intervals."
        if not measured:
            where = source.missing()
        elif not own:
            where = f"`{source.results}/leaderboard.csv` has no row of it."
        page = card(cls, own, theirs, where, studies)
        found[folder / f"{cls.name}.md"] = f"{_written()}\n\n{page}"
    index = [
        _written(),
        "# Methods, controls and bounds",
        "Each page is a card: idea, source, rule, cost and deviations, parameters, published and "
        "measured values. Bounds choose by what no method in use can see.",
        methods(source, {}),
    ]
    found[folder / "README.md"] = "\n\n".join(index) + "\n"
    return found


def table_reference() -> str:
    """The page of all tables: what a row is, and of each column type, emptiness and meaning."""
    from dyndepth.cells.identity import LEADING
    from dyndepth.pages.markdown import table
    from dyndepth.results.columns import Table
    from dyndepth.results.schema import tables

    def columns(described: Table, names: Sequence[str]) -> str:
        lines = []
        for name in names:
            column = described.columns[name]
            empty = "yes" if column.nullable else "no"
            lines.append((f"`{name}`", column.dtype, empty, column.description))
        return table(("column", "type", "may be empty", "meaning"), lines)

    known = tables()
    first = next(iter(known.values()))
    parts = [
        _written(),
        "# Tables",
        "A run's tables are a function of its cells: equal cells give equal bytes. CSV, UTF-8, "
        "one header, no index column, a missing value is an empty field. Layers count from 0; "
        "intervals are 95%; FLOPs are two per multiply-add. `python -m dyndepth.leaderboard RUN` "
        "shows a run.",
        "## Columns that lead every table of a run",
        columns(first, [name for name in first.columns if name in LEADING]),
    ]
    for name, described in known.items():
        leads = set(LEADING) <= set(described.columns)
        names = described.own if leads else tuple(described.columns)
        before = " After the leading columns:" if leads else ""
        parts += [f"## {name}", f"One row is {_article(described.row)}.{before}"]
        parts.append(columns(described, names))
    return "\n\n".join(parts) + "\n"


def _article(row: str) -> str:
    return row if row.startswith(("a ", "an ")) else f"a {row}"


def _written() -> str:
    return f"<!-- Written by {COMMAND} (python -m dyndepth.pages); edits are lost. -->"


def stale(root: Path, found: dict[Path, str]) -> list[Path]:
    """Cards of methods that there are no more, relative to ``root``."""
    there = (path.relative_to(root) for path in (root / "docs" / "methods").glob("*.md"))
    return sorted(path for path in there if path not in found)


def differing(root: Path, found: dict[Path, str]) -> list[Path]:
    """The files whose text is not the one in ``found``, relative to ``root``."""
    return [
        path
        for path, text in found.items()
        if not (root / path).is_file() or (root / path).read_text(encoding="utf-8") != text
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if ``--check`` finds a difference, 2 for wrong input."""
    return run("pages", _pages, arguments)


def _pages(given: list[str]) -> int:
    parser = Parser(
        "pages",
        "Write the methods' cards, the reference of the tables, and the generated parts of README "
        "and docs from the committed results.",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help=f"the main run's folder, relative to the repository (default: {RESULTS})",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 and name what differs"
    )
    options, root = parser.parse_args(given), ROOT
    if not (root / "docs").is_dir():
        raise UserError(f"{root} has no docs/: pages are written in a checkout of the project")
    if not (root / options.results / "leaderboard.csv").is_file() and options.results != RESULTS:
        raise UserError(
            f"--results {options.results} holds no leaderboard.csv; give a run's folder"
        )
    found = pages(root, options.results)
    changed, old = differing(root, found), stale(root, found)
    drawn = [each for each in pictures(root, options.results, found) if not each.current(root)]
    if options.check:
        return _report([*changed, *(each.path for each in drawn)], old)
    texts = {path: found[path] for path in changed} | {each.path: each.svg() for each in drawn}
    _write(root, texts, old)
    return 0


def _report(changed: Sequence[Path], old: Sequence[Path]) -> int:
    for path in changed:
        print(f"{path} is not what the results and the code give; {COMMAND} writes it anew")
    for path in old:
        print(f"{path} is of no method; {COMMAND} removes it")
    return 1 if changed or old else 0


def _write(root: Path, changed: dict[Path, str], old: Sequence[Path]) -> None:
    from dyndepth.common.files import write_atomically

    for path, text in changed.items():
        write_atomically(root / path, text)
        print(f"written: {path}")
    for path in old:
        (root / path).unlink()
        print(f"removed: {path}")


if __name__ == "__main__":
    sys.exit(main())
