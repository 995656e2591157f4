"""One page a method: what its file says of it, what it declares, what was published of it, and what
was measured here.

The text is the docstring of the method's module, laid out as Markdown; everything else is read from
its class and from tables. Nothing is written by hand. What a method may offer for its page:
``Fields:`` in the docstring of its class; and, where one of its parameters names a set of settings,
a mapping in its module from those names to dataclasses of such settings
(``parameters.presets``).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.cells.identity import Row
from dyndepth.cells.naming import label
from dyndepth.cells.recipe import NONE, shortened
from dyndepth.common.errors import UserError
from dyndepth.common.spec import parameters_of
from dyndepth.pages.markdown import joined, layout, markup, table
from dyndepth.pages.parameters import choices, parameters, preset_table
from dyndepth.results.noise import legend, told_of
from dyndepth.results.numbers import Record, number, read, spread
from dyndepth.results.published import HANDED, HANDS, kind_of, known_well, nearest

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod


_DECIDES = {
    "static": "one plan for all inputs",
    "sequence": "a plan for each sequence",
    "token": "gates for each token, from its hidden state or position",
}
_KV = {
    "drop": "none are kept: a sequence that skips an attention once skips it always",
    "project": "computed from the token's current state, kept, and billed",
    "prompt_only": "the prompt's are kept and not extended in generation",
    "evict": "neither computed nor kept: no later token sees one that skipped",
}


def kind(cls: type[DynamicDepthMethod]) -> str:
    """``bound``, ``lossless``, ``control`` or ``method``."""
    if cls.uses_labels:
        return "bound"
    if cls.speculates:
        return "lossless"
    return "control" if cls.paper == "control" else "method"


def summary(cls: type[DynamicDepthMethod]) -> str:
    """The first sentence of the method's module, without the name before its colon."""
    return markup(_module(cls).splitlines()[0].partition(": ")[2] or _module(cls).splitlines()[0])


def card(
    cls: type[DynamicDepthMethod],
    measured: Sequence[Record],
    published: Sequence[Row],
    where: str,
    studies: Mapping[str, Sequence[Record]] | None = None,
) -> str:
    """The page of a method.

    Args:
        cls: its class.
        measured: its rows of the main run's leaderboard.csv; empty: none are committed.
        published: its rows of the table of published values; empty: there are none.
        where: sentence that says where ``measured`` comes from, or why there is nothing.
        studies: study -> leaderboard rows of any method, as ``study_rows`` gives.
    """
    text = _module(cls)
    first, _, rest = text.partition("\n")
    elsewhere = {
        name: own
        for name, found in (studies or {}).items()
        if (own := [row for row in found if row["method"] == cls.name])
    }
    count = row_count(sum(map(len, elsewhere.values())))
    more = f" {who_has(elsewhere)} {count} of it: see {STUDIES}." if elsewhere else ""
    parts = [
        f"# `{cls.name}`",
        markup(first),
        f"**Status.** {status(cls, measured, published, elsewhere)}",
        layout(rest),
        "## Declared",
        facts(cls),
        "## Parameters",
        parameters(cls),
        preset_table(cls),
        "## Published values",
        claims(cls, published, measured),
        "## What was measured here",
        where + more,
        rows(measured),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def training(cls: type[DynamicDepthMethod]) -> str:
    """``trained``, ``its source trained`` or nothing. A method that follows another one
    (``source_method``) only has that one trained."""
    if not cls.needs_training:
        return ""
    return "its source trained" if hasattr(cls, "source_method") else "trained"


_TRAINS = {
    "": "no",
    "trained": "yes: `fit` takes minutes or more",
    "its source trained": "nothing of its own: its source is trained, in minutes or more",
}


def facts(cls: type[DynamicDepthMethod]) -> str:
    """What the class declares, and what follows from its defaults."""
    default = cls()
    chooses = any(field.name == "phases" for field in fields(cls))
    skips = {"both": "in prompt and generation", "generation": "in the generation only"}
    lines = [
        ("kind", kind(cls)),
        ("decides", f"{cls.granularity}: {_DECIDES[cls.granularity]}"),
        ("skips", skips[default.phases] + (" by default (`phases`)" if chooses else "")),
        ("skips in its paper", skips.get(cls.published_phases or "", "")),
        ("keys and values of what is skipped", f"{default.kv_policy}: {_KV[default.kv_policy]}"),
        ("trains", _TRAINS[training(cls)]),
        ("sees the answers", "yes: a bound" if cls.uses_labels else "no"),
        ("source", cls.paper),
        ("file", f"`{_file(cls)}`"),
    ]
    return table(("fact", "value"), [line for line in lines if line[1]])


def claims(
    cls: type[DynamicDepthMethod], published: Sequence[Row], measured: Sequence[Record]
) -> str:
    """Published values with the document that they were read in, and beside each our row that
    ``published.nearest`` finds."""
    if not published:
        control = kind(cls) == "control"
        return "None: it is a control." if control else "No value of it is kept here."
    ours = [
        {**row, "block_speedup": float(row["block_speedup"] or 0)}
        for row in filter(known_well, measured)
    ]
    lines = []
    for row in published:
        speedup = (
            "" if row["speedup"] is None else f"{row['speedup']:g}x ({row['unit_of_speedup']})"
        )
        values = ("" if row[key] is None else f"{row[key]:g}" for key in ("dense_value", "value"))
        source = f"{row['source']}. {row['note']}" if row["note"] else row["source"]
        close = nearest(row, ours) if row["speedup"] else None
        recovery = kind_of(row.get("recovery"))
        settings = [row["parameters"], "" if recovery == NONE else f"recovery={recovery}"]
        given = ", ".join(filter(None, settings))
        what = (given, row["model"], speedup, f"{row['task']}, {row['metric']}")
        lines.append((*what, *values, _ours(close), HANDS[row["hand"]], source))
    headings = ("parameters", "model", "speedup", "task", "dense", "value")
    found = table((*headings, "ours at the nearest block FLOPs", "hand", "source"), lines)
    return f"{found}\n\n{HANDED}"


def _ours(row: Row | None) -> str:
    if row is None:
        return ""
    name = label(row)
    setting = "" if name == row["method"] else f" with `{name}`"
    texts = [f"{row['block_speedup']:.2f}x on {row['model']}{setting}"]
    if row["retained"]:
        kept = spread(row, "retained", "retained_low", "retained_high", "{:.2f}")
        texts.append(f"{kept} of dense's accuracy")
    if row["bits_per_byte"]:
        texts.append(f"{number(row['bits_per_byte'])} bits per byte")
    return ", ".join(texts)


def rows(measured: Sequence[Record]) -> str:
    """Rows of leaderboard.csv: achieved speedups and scores with 95% intervals; empty if none."""
    if not measured:
        return ""
    lines = []
    for row in measured:
        settings = [row["parameters"], f"phases={row['phases']}"]
        if row["recovery"] != NONE:
            settings.append(f"recovery={shortened(row['recovery'])}")
        lines.append(
            (
                ", ".join(filter(None, settings)),
                number(row["target_speedup"], "{:g}x"),
                row["seed"],
                number(row["block_speedup"], "{:.2f}x"),
                number(row["total_speedup"], "{:.2f}x"),
                spread(row, "mean_acc", "mean_acc_low", "mean_acc_high"),
                spread(row, "bits_per_byte", "bits_per_byte_low", "bits_per_byte_high"),
                wall(row, "prefill"),
                wall(row, "decode"),
                row["status"] + (f": {row['error']}" if row["error"] else ""),
            )
        )
    headings = ("settings", "target", "seed", "block FLOPs", "total FLOPs", "mean accuracy")
    found = table((*headings, "bits per byte", "prefill", "decode", "status"), lines)
    return with_legend(found, [text for line in lines for text in line[7:9]])


def with_legend(found: str, walls: Sequence[str]) -> str:
    """A table, and below it what the words beside its wall speedups mean, if there are any."""
    meant = legend(walls)
    return f"{found}\n\nBeside prefill and decode: {meant}." if meant else found


def wall(row: Record, phase: str) -> str:
    """The wall speedup of ``prefill`` or ``decode`` in a row of leaderboard.csv."""
    return told_of(row, phase, form="{:.2f}")


def _module(cls: type[DynamicDepthMethod]) -> str:
    return inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or cls.name)


def _file(cls: type[DynamicDepthMethod]) -> str:
    """Where the method lies in the repository."""
    module = sys.modules[cls.__module__]
    path = cls.__module__.removeprefix("dyndepth.").replace(".", "/")
    return f"{path}/" if hasattr(module, "__path__") else f"{path}.py"


STUDIES = "[studies](../studies.md)"
"""Where a card's reader finds the studies."""


def study_rows(root: Path, results: Path) -> dict[str, list[Record]]:
    """Study -> rows of its leaderboard.csv, of the folders with claims beside the main run's
    (``results``, relative to ``root``)."""
    beside = (path.parent for path in sorted((root / results).parent.glob("*/claims.csv")))
    boards = {folder.name: folder / "leaderboard.csv" for folder in beside}
    main = (root / results).name
    return {name: read(path) for name, path in boards.items() if path.is_file() and name != main}


def status(
    cls: type[DynamicDepthMethod],
    measured: Sequence[Record],
    published: Sequence[Row],
    elsewhere: Mapping[str, Sequence[Record]],
) -> str:
    """What is committed, in the main run and ``elsewhere`` (study -> rows of the method), what
    failed, what of the method has no row, and whether any of it is of a model that was published
    of."""
    committed = [*measured, *(row for own in elsewhere.values() for row in own)]
    if not committed:
        return "Implemented and tested; no row of it is committed."
    done = sum(row["status"] == "done" for row in measured)
    models = joined(row["model"] for row in committed)
    text = "Implemented and tested; no row of it in the main run"
    if measured:
        text = f"Implemented and tested; {done} of {len(measured)} cells of the main run finished"
    if elsewhere:
        count = row_count(sum(map(len, elsewhere.values())))
        text += f", and {who_has(elsewhere).lower()} {count} of it ({STUDIES})"
    text += f"; measured on {models}."
    missing = unmeasured(cls, committed)
    if missing:
        text += f" No committed row has {'; '.join(missing)}."
    theirs = {row["model"] for row in published if row.get("model")}
    if theirs and not theirs & {row["model"] for row in committed}:
        text += (
            f" The published values are of {joined(sorted(theirs))}: they stand beside ours and do "
            "not compare with them row by row."
        )
    if cls.speculates:
        text += " Lossless, and no competitor: it writes what dense writes and saves no FLOPs."
    return text + (" A bound, not a competitor." if cls.uses_labels else "")


def row_count(count: int) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count} row{'' if count == 1 else 's'}"


def who_has(names: Mapping[str, Any]) -> str:
    """``The study `a` has``, ``The studies `a` and `b` have``."""
    several = len(names) > 1
    found = joined(f"`{name}`" for name in names)
    return f"The {'studies' if several else 'study'} {found} {'have' if several else 'has'}"


def unmeasured(cls: type[DynamicDepthMethod], committed: Sequence[Record]) -> list[str]:
    """``parameter=choice or choice`` for what no row of ``committed`` has, of the parameters that
    are a choice among names."""
    missing = []
    for name, known in choices(cls).items():
        default = next(field.default for field in fields(cls) if field.name == name)
        found = set()
        for row in committed:
            try:
                given = parameters_of(f"{cls.name}({row['parameters']})", "method")
            except UserError:
                continue
            found.add(row["phases"] if name == "phases" else given.get(name, default))
        left = [f"`{name}={choice}`" for choice in known if choice not in found]
        if left:
            missing.append(" or ".join([", ".join(left[:-1]), left[-1]] if left[1:] else left))
    return missing
