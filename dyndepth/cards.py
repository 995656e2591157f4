"""One page a method: what its file says of it, what it declares, what its paper reports, and what
was measured here.

The text is the docstring of the method's module, laid out as Markdown; everything else is read from
its class and from tables. Nothing is written by hand.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, get_args, get_type_hints

from dyndepth.markdown import Record, joined, layout, markup, number, spread, table
from dyndepth.published import nearest
from dyndepth.recipe import NONE, shortened
from dyndepth.records import Row

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod

BEFORE = "target_speedup", "seed"
"""Parameters that every method has."""

_LIST = re.compile(r"^(?:Fields|Attributes):\n", re.MULTILINE)
_FIELD = re.compile(r"([a-z_]+(?:, [a-z_]+)*): (.*)")

_NAMES: dict[object, str] = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    type(None): "none",
}
_DECIDES = {
    "static": "one plan for all inputs",
    "sequence": "a plan for each sequence",
    "token": "gates for each token, from its hidden state or position",
}
_KV = {
    "drop": "none are kept: a sequence that skips an attention once skips it always",
    "project": "computed from the token's current state, kept, and billed",
    "prompt_only": "the prompt's are kept and not extended in generation",
}


def kind(cls: type[DynamicDepthMethod]) -> str:
    """``bound``, ``control`` or ``method``."""
    if cls.uses_labels:
        return "bound"
    return "control" if cls.paper == "control" else "method"


def summary(cls: type[DynamicDepthMethod]) -> str:
    """The first sentence of the method's module, without the name before its colon."""
    return markup(_module(cls).splitlines()[0].partition(": ")[2] or _module(cls).splitlines()[0])


def card(
    cls: type[DynamicDepthMethod],
    measured: Sequence[Record],
    published: Sequence[Row],
    where: str,
) -> str:
    """The page of a method.

    Args:
        cls: its class.
        measured: its rows of a run's leaderboard.csv; empty: none are committed.
        published: its rows of the table of published values; empty: there are none.
        where: sentence that says where ``measured`` comes from, or why there is nothing.
    """
    text = _module(cls)
    first, _, rest = text.partition("\n")
    parts = [
        f"# `{cls.name}`",
        markup(first),
        f"**Status.** {status(cls, measured, published)}",
        layout(rest),
        "## Declared",
        facts(cls),
        "## Parameters",
        parameters(cls),
        "## What its paper reports",
        claims(cls, published, measured),
        "## What was measured here",
        where,
        rows(measured),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def status(
    cls: type[DynamicDepthMethod], measured: Sequence[Record], published: Sequence[Row]
) -> str:
    """What is committed, what failed, and whether any of it is of a model that its paper used."""
    if not measured:
        return "Implemented and tested; no row of it in the committed run."
    done = sum(row["status"] == "done" for row in measured)
    models = joined(row["model"] for row in measured)
    text = f"Implemented and tested; {done} of {len(measured)} committed cells finished ({models})."
    theirs = {row["model"] for row in published if row.get("model")}
    if theirs and not theirs & {row["model"] for row in measured}:
        text += (
            f" The published values are of {joined(sorted(theirs))}: they stand beside ours and do "
            "not compare with them row by row."
        )
    return text + (" A bound, not a competitor." if cls.uses_labels else "")


def facts(cls: type[DynamicDepthMethod]) -> str:
    """What the class declares, and what follows from its defaults."""
    default = cls()
    chooses = any(field.name == "phases" for field in fields(cls))
    skips = {"both": "in prompt and generation", "generation": "in the generation only"}
    lines = [
        ("kind", kind(cls)),
        ("decides", f"{cls.granularity}: {_DECIDES[cls.granularity]}"),
        ("skips", skips[default.phases] + (" by default (`phases`)" if chooses else "")),
        ("keys and values of what is skipped", f"{default.kv_policy}: {_KV[default.kv_policy]}"),
        ("trains", "yes: `fit` takes minutes or more" if cls.needs_training else "no"),
        ("sees the answers", "yes: a bound" if cls.uses_labels else "no"),
        ("source", cls.paper),
        ("file", f"`{_file(cls)}`"),
    ]
    return table(("fact", "value"), lines)


def parameters(cls: type[DynamicDepthMethod]) -> str:
    """The method's own parameters: choices or type, default, and what its docstring says."""
    described = descriptions(cls)
    hints = get_type_hints(cls)
    lines = [
        (
            f"`{field.name}`",
            _values(hints[field.name]),
            f"`{_default(field.default)}`",
            described.get(field.name, ""),
        )
        for field in fields(cls)
        if field.init and field.name not in BEFORE
    ]
    if not lines:
        return "None beside the target speedup and the seed."
    return table(("parameter", "values", "default", "meaning"), lines)


def descriptions(cls: type[DynamicDepthMethod]) -> dict[str, str]:
    """Parameter -> what docstrings say of it, as Markdown: the class's own first, then those of
    the dataclasses that its module uses (settings that it repeats as parameters)."""
    names = vars(sys.modules[cls.__module__]).values()
    # What comes from elsewhere may have names in common and mean something else by them.
    own = (each for each in names if getattr(each, "__module__", "").startswith(cls.__module__))
    found: dict[str, str] = {}
    for source in (cls, *filter(is_dataclass, own)):
        found = _described(inspect.cleandoc(source.__doc__ or "")) | found
    return found


def _described(text: str) -> dict[str, str]:
    """Name -> text of the entries under ``Fields:`` or ``Attributes:``."""
    found: dict[str, str] = {}
    names: list[str] = []
    *_, listed = _LIST.split(text, maxsplit=1)
    for line in listed.splitlines():
        depth = len(line) - len(line.lstrip())
        entry = _FIELD.fullmatch(line.strip())
        if entry and depth <= 4:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif depth > 4:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return {name: markup(words) for name, words in found.items()}


def claims(
    cls: type[DynamicDepthMethod], published: Sequence[Row], measured: Sequence[Record]
) -> str:
    """The values of its paper with their source, and our row of the nearest budget, without
    recovery, beside each."""
    if not published:
        control = kind(cls) == "control"
        return "Nothing: it is a control." if control else "No value of it is kept here."
    ours = [
        {**row, "block_speedup": float(row["block_speedup"] or 0)}
        for row in measured
        if row["recovery"] == NONE
    ]
    lines = []
    for row in published:
        speedup = (
            "" if row["speedup"] is None else f"{row['speedup']:g}x ({row['unit_of_speedup']})"
        )
        values = ("" if row[key] is None else f"{row[key]:g}" for key in ("dense_value", "value"))
        source = f"{row['source']}. {row['note']}" if row["note"] else row["source"]
        close = nearest(row, ours) if row["speedup"] else None
        what = (row["parameters"], row["model"], speedup, f"{row['task']}, {row['metric']}")
        lines.append((*what, *values, _ours(close), source))
    headings = ("parameters", "model", "speedup", "task", "dense", "value")
    return table((*headings, "ours at the nearest block FLOPs", "source"), lines)


def _ours(row: Row | None) -> str:
    if row is None:
        return ""
    texts = [f"{row['block_speedup']:.2f}x on {row['model']}"]
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
    return table((*headings, "bits per byte", "prefill", "decode", "status"), lines)


def wall(row: Record, phase: str) -> str:
    """The wall speedup of ``prefill`` or ``decode`` in a row of leaderboard.csv."""
    return spread(row, f"wall_{phase}_speedup", f"wall_{phase}_low", f"wall_{phase}_high", "{:.2f}")


def _module(cls: type[DynamicDepthMethod]) -> str:
    return inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or cls.name)


def _file(cls: type[DynamicDepthMethod]) -> str:
    """Where the method lies in the repository."""
    module = sys.modules[cls.__module__]
    path = cls.__module__.removeprefix("dyndepth.").replace(".", "/")
    return f"{path}/" if hasattr(module, "__path__") else f"{path}.py"


def _values(hint: object) -> str:
    """A type as a person reads it; the choices of a Literal."""
    inner = get_args(hint)
    if not inner:
        return _NAMES.get(hint) or str(getattr(hint, "__name__", hint))
    if all(isinstance(choice, str) for choice in inner):
        return ", ".join(f"`{choice}`" for choice in inner)
    return " or ".join(_values(choice) for choice in inner)


def _default(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
