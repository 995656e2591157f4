"""Shows the claims of a study: tables on the console, ``claims.csv`` and ``claims.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import CHAT, Row, flat
from dyndepth.common.files import write_atomically
from dyndepth.common.printing import Column, print_columns
from dyndepth.results.statistics.differences import RESAMPLES
from dyndepth.results.tables import csv_text
from dyndepth.studies import acceptance, predictions
from dyndepth.studies.study import Claim, Study
from dyndepth.studies.verdicts import COLUMNS, VERDICTS, label

HEADINGS = (
    *("task", "against", "target", "share", "A", "B", "A - B", "95% interval"),
    *("p (Holm)", "n", "seeds", "verdict"),
)

_RANKS = {"seeds": 6, "p (Holm)": 5, "n": 4, "share": 3, "B": 2, "A": 1}
"""Of ``HEADINGS``, those that a narrow terminal leaves out; see ``printing.Column``."""

CONDITIONS = (
    *("model", "model_fingerprint", "tokenizer_fingerprint", "limit", "sample_seed"),
    *("num_fewshot", *CHAT, "device", "dtype"),
    *("data_fingerprint", "dyndepth", "torch", "transformers", "git_commit"),
)
"""What all cells of a report share, from their identity."""

HOW = f"""\
`share` is the share of dense's block FLOPs that A executed on the task (of all FLOPs, or of
dense's sublayers, where a claim counts those). B is interpolated to it, document by document,
between its two neighbouring measured budgets (dense among them) and never beyond them. Where a
claim asks how much depth dense's quality takes, `against` names the method and `A` is the least
share of dense's block FLOPs at which its curve is as good as dense, with the interval of that
share; what a bound chose on these documents is not chosen anew in each resample. "Reached" means
that the interval lies below full depth. Intervals: paired bootstrap over `n` documents (blocks,
where sublayers are compared), {RESAMPLES:,} resamples, not adjusted. A difference counts as shown
if its interval excludes 0 and p holds after Holm's correction over the claim's table. Seeds are
averaged by document first; the intervals do not cover what another seed of the training would
change. "No difference shown" is no proof of equality: the interval says how large a difference may
still be."""


def write(
    study: Study,
    rows: Sequence[Row],
    cells: Sequence[Cell],
    positions: Sequence[Row],
    accepted: Sequence[Row],
    path: Path,
) -> list[Path]:
    """Write the files under ``path`` and return where; equal rows give equal bytes.

    ``claims.csv`` holds ``rows``; ``claims.md`` the same for people; ``positions.csv``, if routes
    were recorded, the executed fraction by range of positions; ``acceptance.csv`` and
    ``predictions.csv``, if drafts were, what of them is accepted (``accepted``), and what that
    should come to on other models.
    """
    written = {
        path / "claims.csv": csv_text(rows, COLUMNS),
        path / "claims.md": markdown(study, rows, cells),
    }
    if positions:
        written[path / "positions.csv"] = csv_text(positions, tuple(positions[0]))
    if accepted:
        predicted = list(predictions.predictions(accepted))
        written[path / "acceptance.csv"] = csv_text(accepted, acceptance.COLUMNS)
        written[path / "predictions.csv"] = csv_text(predicted, predictions.COLUMNS)
    for file, text in written.items():
        write_atomically(file, text)
    return list(written)


def show(study: Study, rows: Sequence[Row]) -> None:
    """Print one table a claim."""
    for claim in study.claims:
        own = _of(claim, rows)
        told = list(zip(*map(texts, own), strict=True)) or [()] * len(HEADINGS)
        columns = [
            Column(
                heading,
                list(entries),
                name=heading in ("task", "against", "verdict"),
                rank=_RANKS.get(heading, 0),
            )
            for heading, entries in zip(HEADINGS, told, strict=True)
        ]
        caption = f"A: {label(claim.a)}. {tally(own)}"
        print_columns(columns, f"{claim.name}: {claim.text}", caption)
        print()


def markdown(study: Study, rows: Sequence[Row], cells: Sequence[Cell]) -> str:
    """The report as Markdown: conditions, then each claim with its source and table."""
    one = cells[0].identity
    lines = [f"# {study.title}", "", HOW, ""]
    lines += [f"- {key}: {flat(one[key])}" for key in CONDITIONS]
    lines.append(f"- cells: {len(cells)}, of them failed: {_failed(cells)}")
    for claim in study.claims:
        own = _of(claim, rows)
        lines += ["", f"## {claim.name}", "", f"{claim.text} ({claim.source})", ""]
        lines += [f"Published: {claim.published}.", ""] if claim.published else []
        lines += [f"A: `{label(claim.a)}`. {tally(own)}", ""]
        lines += [_line(HEADINGS), _line(["---"] * len(HEADINGS))]
        lines += [_line(texts(row)) for row in own]
    return "\n".join(lines) + "\n"


def tally(rows: Sequence[Row]) -> str:
    """The verdicts of one claim, counted: ``better: 3, worse: 1 (of 4)``."""
    counts = Counter(row["verdict"] for row in rows)
    names = sorted(counts, key=lambda name: (name in VERDICTS[2:], name))
    return f"{', '.join(f'{name}: {counts[name]}' for name in names)} (of {len(rows)})"


def texts(row: Row) -> list[str]:
    """One row of claims.csv as a person reads it, in the order of ``HEADINGS``."""
    verdict = row["verdict"] + (f" ({row['reason']})" if row.get("reason") else "")
    seeds = [str(row[key]) for key in ("seeds_a", "seeds_b") if row.get(key)]
    interval = ""
    sign = "" if row["kind"] == "reach" else "+"
    if row.get("low") is not None:
        interval = f"[{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"
    return [
        f"{row.get('task', '')} {row['metric']}".strip(),
        row["a"] if row["kind"] == "reach" else row.get("b", ""),
        _number(row, "target_speedup", "{:g}x"),
        _number(row, "fraction_a", "{:.3f}"),
        _number(row, "value_a", "{:.3f}"),
        _number(row, "value_b", "{:.3f}"),
        _number(row, "difference", "{:+.3f}"),
        interval,
        _number(row, "p_holm", "{:.4f}"),
        _number(row, "n", "{}"),
        "/".join(seeds),
        verdict,
    ]


def _of(claim: Claim, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["claim"] == claim.name]


def _failed(cells: Sequence[Cell]) -> int:
    return sum(cell.status == "error" for cell in cells)


def _number(row: Row, key: str, form: str) -> str:
    return "" if row.get(key) is None else form.format(row[key])


def _line(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entry.replace('|', '/') for entry in entries)} |"
