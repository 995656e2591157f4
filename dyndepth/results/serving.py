"""Latency, throughput and memory of a leaderboard: one table of texts, for terminal and pages.

A row that was measured has two lines, dense and the method in the same rounds; dense's own row one.
A time never stands without its interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dyndepth.cells.cell import DENSE
from dyndepth.cells.naming import titled
from dyndepth.cells.recipe import NONE
from dyndepth.common.markup import markdown_table
from dyndepth.common.printing import Column, narrow, print_columns
from dyndepth.results.noise import told

TITLE = "Latency, throughput and memory"

MEGA = 1e6
"""Bytes of an MB."""

WIDE = 160
"""Columns of a terminal from which on the table is shown."""


class Measure(NamedTuple):
    """``<side>_<name>`` of a leaderboard's row; its heading, form and unit."""

    name: str
    heading: str
    form: str = "{:.1f}"
    unit: float = 1.0


MEASURES = (
    Measure("ttft_ms", "TTFT ms"),
    Measure("tpot_ms", "TPOT ms"),
    Measure("tokens_per_s", "tokens/s"),
    Measure("peak_bytes", "peak MB", unit=MEGA),
    Measure("peak_above_bytes", "peak above weights MB", unit=MEGA),
    Measure("cache_bytes", "cache MB", "{:.2f}", MEGA),
)

CAPTION = (
    "TTFT: the whole batch's prompts and their first tokens; TPOT and tokens/s: decode; peak above "
    "weights: beyond what was held before the prompt; cache: keys and values kept at the end; MB: "
    "10^6 bytes; [..] are 95% intervals; dense and method ran in turns"
)


class Serving(NamedTuple):
    """Headings, and rows of as many texts; the first three are names."""

    headings: list[str]
    rows: list[list[str]]


def names(rows: Sequence[Mapping[str, Any]], letters: Sequence[str]) -> list[str]:
    """What tells the rows apart: method, its setting's letter if there are several
    (``naming.lettered``), target, whether it is lossless, and seed where others differ from it in
    nothing else."""
    found = [
        f"{', '.join(filter(None, (titled(row), letter)))} {row['target_speedup']:g}x"
        f"{' (lossless)' if row.get('lossless') else ''}"
        for row, letter in zip(rows, letters, strict=True)
    ]
    seeds: dict[str, set[Any]] = {}
    for name, row in zip(found, rows, strict=True):
        seeds.setdefault(name, set()).add(row["seed"])
    return [
        f"{name}, seed {row['seed']}" if len(seeds[name]) > 1 else name
        for name, row in zip(found, rows, strict=True)
    ]


def serving(rows: Sequence[Mapping[str, Any]], letters: Sequence[str]) -> Serving:
    """The table of those leaderboard rows that were measured, without columns that none has;
    ``letters`` are those of the rows' settings (``naming.lettered``)."""
    lines: list[tuple[list[str], list[str]]] = []
    for row, name in zip(rows, names(rows, letters), strict=True):
        plain = row["method"] == DENSE and row["recovery"] == NONE
        # Of dense itself the attached side is no more than how close the runtime comes to it.
        for side in ("dense",) if plain else ("dense", "method"):
            texts = [_text(row, side, measure) for measure in MEASURES]
            if any(texts):
                shape = f"{row.get('wall_batch')}x{row.get('wall_length')}"
                own = [name, side, shape]
                over = (_over(row, phase) if side == "method" else "" for phase in _PHASES)
                lines.append((own, [*texts, *over]))
    headings = [*(each.heading for each in MEASURES)]
    headings += [f"{phase} over compiled dense" for phase in _PHASES]
    known = [place for place in range(len(headings)) if any(texts[place] for _, texts in lines)]
    return Serving(
        ["method", "side", "shape", *(headings[place] for place in known)] if lines else [],
        [[*own, *(texts[place] for place in known)] for own, texts in lines],
    )


def show_serving(rows: Sequence[Mapping[str, Any]], letters: Sequence[str]) -> None:
    """Print it, unless there is none or the terminal is narrower than ``WIDE``."""
    found = serving(rows, letters)
    if not found.rows or narrow(WIDE):
        return
    columns = [
        Column(heading, texts, name=place < 3, rank=0 if place < 6 else 1)
        for place, (heading, *texts) in enumerate(zip(found.headings, *found.rows, strict=True))
    ]
    print_columns(columns, TITLE, CAPTION)


def on_page(rows: Sequence[Mapping[str, Any]], letters: Sequence[str]) -> dict[str, Any]:
    """It as plain data of a page: ``title``, ``caption``, ``headings``, ``rows``."""
    return {"title": TITLE, "caption": f"{CAPTION}."} | serving(rows, letters)._asdict()


def as_markdown(page: Mapping[str, Any]) -> list[str]:
    """Lines of what ``on_page`` gives; none where nothing was measured."""
    if not page["rows"]:
        return []
    table = markdown_table(page["headings"], page["rows"])
    return ["", f"## {page['title']}", "", page["caption"], "", table]


_PHASES = ("prefill", "decode")


def _text(row: Mapping[str, Any], side: str, measure: Measure) -> str:
    name = f"{side}_{measure.name}"
    value, low, high = (row.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None or value == "":
        return ""
    text = measure.form.format(float(value) / measure.unit)
    if measure.name.endswith("_bytes"):
        return text
    if low is None or high is None:
        return f"{text} no interval"
    return f"{text} [{measure.form.format(low)}, {measure.form.format(high)}]"


def _over(row: Mapping[str, Any], phase: str) -> str:
    name = f"{phase}_over_compiled"
    return told(row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high"))
