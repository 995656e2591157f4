"""The command line ``python -m dyndepth.importance``: which blocks or sublayers matter, by what.

Prints a table of scores and ranks (1 = first to go), and with ``--output_path`` writes
``importance.csv`` and ``importance.png``. With ``--adapter`` it says how far each criterion goes
together with the scores of a recovery by ``lora(modules=ila)``.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.common.commands import Parser, run
from dyndepth.common.errors import UserError
from dyndepth.common.paths import EMBEDDED, check_folder, path_of

if TYPE_CHECKING:
    from dyndepth.fitting.importance import Settings
    from dyndepth.results.statistics.ranks import Agreement


COLUMNS = ("criterion", "unit", "layer", "sublayer", "score", "rank")
"""Of ``importance.csv``. ``layer`` is counted from 0; ``sublayer`` is ``block`` for blocks."""

# Of each kind what tells them apart; the search takes minutes, and joint holds its two parts.
_UNASKED = ("block_influence", "angular", "perplexity", "taylor", "joint")
_SEARCHED = ("greedy", "random")
_SETTINGS = ("unit", "windows", "length", "seed", "search")

Tables = dict[str, list[dict[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 2 for wrong input, 130 after Ctrl-C."""
    return run("importance", _importance, arguments, "interrupted; what was measured is kept")


def _parser() -> Parser:
    built = Parser(
        "importance", "Rank a model's blocks or sublayers by importance on calibration text."
    )
    add = built.add_argument
    add(
        "criteria",
        nargs="*",
        metavar="CRITERION",
        help="block_influence, angular, perplexity, greedy, taylor, attention, mlp, joint, last, "
        f"random (default: {' '.join(_UNASKED)})",
    )
    built.model()
    add("--unit", choices=("block", "sublayer"), help="what is ranked (default: the criterion's)")
    built.whole("windows", 1, "of calibration text (default: the criterion's)")
    built.whole("length", 1, "tokens of each window (default: the criterion's)")
    built.whole("run", 1, "angular: blocks that go together", 1)
    add(
        "--search",
        choices=("full", "lazy"),
        default="full",
        help="greedy: which search (default: full)",
    )
    built.number(
        "until",
        lambda share: 0 < share <= 1,
        "a share above 0 and up to 1",
        "greedy: share of the block FLOPs at which it stops (default: 2/3)",
        2 / 3,
    )
    for end in ("first", "last"):
        built.whole(
            f"keep_{end}",
            0,
            f"{end} blocks that are left out (default: none; 1 for {' and '.join(_SEARCHED)})",
        )
    built.whole("seed", 0, "of the text's windows, and of random", 0)
    built.shared("corpus", EMBEDDED)
    add(
        "--adapter",
        metavar="FOLDER",
        help="of a recovery by 'lora(modules=ila)': its scores by block, and their rank "
        "correlation with each criterion",
    )
    add("--output_path", metavar="FOLDER", help="for importance.csv and importance.png")
    return built


def _importance(given: list[str]) -> None:
    """Measure, print, write; the last line printed is one JSON document."""
    options = vars(_parser().parse_args(given))
    from dyndepth.fitting.importance import CRITERIA, rank
    from dyndepth.fitting.recovery import adapters
    from dyndepth.studies import significance

    chosen = _chosen(options)
    output = options["output_path"]
    if output is not None:
        output = check_folder("output_path", path_of(output))
    if options["adapter"] is not None:
        significance.unit_scores(adapters.read_card(options["adapter"]), "block")
    model, corpus = _loaded(options, chosen.values())
    card = adapters.load_adapter(options["adapter"], model).card if options["adapter"] else None
    began = time.monotonic()
    tables: Tables = {}
    agreements: dict[str, Agreement] = {}
    for name, settings in chosen.items():
        print(f"{name}: measuring {settings.kind}s", flush=True)
        found = rank(model, corpus, settings, until=options["until"], run=options["run"])
        tables[name] = [{"criterion": name, "unit": found.kind} | row for row in found.rows()]
        if card is not None:
            agreements[name] = significance.agreement(card, found)
    for kind in ("block", "sublayer"):
        show({name: rows for name, rows in tables.items() if chosen[name].kind == kind}, kind)
    if card is not None:
        show_agreement(card, agreements)
    if output is not None:
        labels = {name: CRITERIA[name].label for name in tables}
        write(tables, labels, output, title=f"Importance, {options['model']}")
    summary = {
        "model": options["model"],
        "first_to_go": {name: _first(rows) for name, rows in tables.items()},
        **({"agreement": {n: a.shown() for n, a in agreements.items()}} if card else {}),
        "seconds": round(time.monotonic() - began, 1),
        "output_path": None if output is None else str(output),
    }
    print(json.dumps({"importance": summary}), flush=True)


def _chosen(options: dict[str, Any]) -> dict[str, Any]:
    """Settings by criterion, in the order given. Raises UserError for what does not exist."""
    from dyndepth.fitting.importance import CRITERIA, Settings, criterion_named

    unit = options["unit"]
    names = options["criteria"] or [
        name for name in _UNASKED if unit in (None, *CRITERIA[name].kinds)
    ]
    found = {}
    for name in dict.fromkeys(names):
        criterion_named(name)
        # All are shown, but for searches, whose outcome depends on what may go.
        keep = None if name in _SEARCHED else 0
        given: dict[str, Any] = {each: options[each] for each in _SETTINGS}
        for end in ("keep_first", "keep_last"):
            given[end] = keep if options[end] is None else options[end]
        try:
            found[name] = Settings(criterion=name, **given)
        except ValueError as fault:
            raise UserError(str(fault)) from None
    return found


def _loaded(options: dict[str, Any], chosen: Iterable[Settings]) -> tuple[Any, Any]:
    """Model and corpus. Raises UserError for a model that is not supported or has too few blocks
    for what is ``chosen``."""
    from dyndepth.data.capacity import check_length
    from dyndepth.data.corpus import load_corpus
    from dyndepth.models.loading import layer_count, load_tokenizer, loaded, longest_window, named

    which = named(options)
    check_length(longest_window(*which), options["length"], "--length", "give fewer")
    layers = layer_count(*which)
    for each in chosen:
        each.ranked(layers, options["run"])
    corpus = load_corpus(options["corpus"], load_tokenizer(*which))
    return loaded(options), corpus


def _first(rows: Sequence[Mapping[str, Any]], count: int = 5) -> list[str]:
    """The first units to go, named."""
    ordered = sorted(rows, key=lambda row: row["rank"])[:count]
    return [f"{row['sublayer']} {row['layer']}" for row in ordered]


def show(tables: Mapping[str, Sequence[Mapping[str, Any]]], kind: str) -> None:
    """Print criteria that rank the same kind of unit side by side: score and rank of each unit."""
    from rich.console import Console
    from rich.table import Table

    if not any(tables.values()):
        return
    table = Table(title=f"Importance of {kind}s: score, and rank in brackets (1 = first to go)")
    headings = ("block",) if kind == "block" else ("block", "sublayer")
    for heading in (*headings, *tables):
        table.add_column(heading, justify="left" if heading == "sublayer" else "right")
    by_unit = {
        name: {(row["layer"], row["sublayer"]): row for row in rows}
        for name, rows in tables.items()
    }
    for at in sorted({unit for units in by_unit.values() for unit in units}):
        cells = [units.get(at) for units in by_unit.values()]
        table.add_row(
            *map(str, at[: len(headings)]),
            *(f"{cell['score']:.4g} ({cell['rank']:2})" if cell else "-" for cell in cells),
        )
    Console().print(table)


def show_agreement(card: Mapping[str, Any], agreements: Mapping[str, Agreement]) -> None:
    """Print the mean scores of an adapter's modules in each block, and how far each criterion goes
    together with them."""
    from rich.console import Console
    from rich.table import Table

    from dyndepth.studies.significance import unit_scores

    parts = {kind: unit_scores(card, kind) for kind in ("block", "sublayer")}
    table = Table(title="Mean score of a recovery's modules (higher: worth training)")
    for heading in ("block", "attention", "mlp", "all"):
        table.add_column(heading, justify="right")
    for layer, _ in parts["block"]:
        found = [parts["sublayer"].get((layer, each)) for each in ("attention", "mlp")]
        found.append(parts["block"][layer, "block"])
        table.add_row(str(layer), *("-" if each is None else f"{each:.3f}" for each in found))
    Console().print(table)
    for name, each in agreements.items():
        print(
            f"Spearman's rank correlation with {name}: {each}, over {each.n} units; the interval "
            "is over resampled units"
        )


def write(tables: Tables, labels: Mapping[str, str], output: Path, *, title: str) -> None:
    """``importance.csv`` and ``importance.png`` in the folder ``output``."""
    from dyndepth.common.files import write_atomically
    from dyndepth.plots.fits import importance

    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for rows in tables.values():
        writer.writerows(row | {"score": f"{row['score']:.10g}"} for row in rows)
    write_atomically(output / "importance.csv", text.getvalue())
    importance(tables, labels, output / "importance.png", title=title)


if __name__ == "__main__":
    sys.exit(main())
