"""The page of what was run on GPUs, and the README's sentence on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dyndepth.gpu.parts import code
from dyndepth.gpu.report import Facts, never_run, outcome, page, read
from dyndepth.pages.blocks import Source
from dyndepth.pages.markdown import joined, table
from dyndepth.results.noise import told

PAGE = Path("docs/gpu_status.md")

BEFORE = "gpu_before.csv"
"""In ``results/``: what was measured by hand, without intervals, before there was a command."""


def records(root: Path) -> dict[str, Facts]:
    """The committed runs on GPUs by their folder, the latest first."""
    found = {
        file.parent.relative_to(root).as_posix(): read(file.parent)
        for file in sorted((root / "results").glob("*/gpu.json"))
    }
    whole = {folder: facts for folder, facts in found.items() if facts and not facts["small"]}
    return dict(sorted(whole.items(), key=lambda item: item[1]["date"], reverse=True))


def current(facts: Facts) -> bool:
    """Whether a run was of the code as it is."""
    return bool(facts["code"] == code())


def status_page(source: Source) -> str:
    """The whole page, but for the line that says what wrote it."""
    found = records(source.root)
    now = {folder: facts for folder, facts in found.items() if current(facts)}
    parts = [
        "# What was run on GPUs",
        "Several GPUs, several machines and models spread over GPUs have not been run on GPUs at "
        "all. `make gpu` (or `python -m dyndepth.gpu`) is ten minutes of a GPU; its folder under "
        "`results/` puts what held and what fell short on this page.",
    ]
    if not now:
        missing = "\n".join(f"- {each}" for each in never_run())
        parts.append(
            f"**The present code has not been run on a GPU.** So not known are:\n\n{missing}"
        )
    for folder, facts in found.items():
        age = "" if folder in now else " It is of older code."
        parts.append(f"{page(facts, '##').rstrip()}\n\nFrom `{folder}/`.{age}")
    return "\n\n".join([*parts, *_before(source)]) + "\n"


def _before(source: Source) -> list[str]:
    """The paragraphs on what was measured before there was a command for it."""
    rows = source.rows("results", BEFORE)
    if not rows:
        return []
    lines = [(row["work"], _figure(row), row["note"]) for row in rows]
    where = joined(f"{row['device']}, commit {row['commit']}, {row['date']}" for row in rows)
    return [
        f"## Earlier: {where}",
        "As measured on that commit, of older code, by hand. No intervals were kept, so how far "
        f"noise moves these numbers is not known. Rows of `results/{BEFORE}`.",
        table(("what", "measured", "note"), lines),
    ]


def _figure(row: dict[str, str]) -> str:
    """A wall speedup with what is said of one without interval, anything else with its unit."""
    if row["unit"] == "speedup":
        return told(row["figure"], None, None)
    return f"{row['figure']} {row['unit']}"


def sentence(source: Source, options: dict[str, Any]) -> str:
    """Whether the present code was run on a GPU, in a sentence. Option ``page``: the link."""
    link = f"[what was run on GPUs]({options['page']})"
    now = [facts for facts in records(source.root).values() if current(facts)]
    if not now:
        return f"The present code has not been run on a GPU yet ({link})."
    told_of = joined(f"{facts['card']} ({outcome(facts)})" for facts in now)
    return f"The present code was run on {told_of}; see {link}."
