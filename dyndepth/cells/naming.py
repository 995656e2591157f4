"""The one short name that a row's method has in tables, figures and pages for people.

A name is a function of the row alone: the method, those of its parameters that are not the
installed method's defaults, its phases where they are not both, and its recovery without what is as
by default. Equal settings have equal names everywhere; different ones differ.

Where one table holds cells of several settings (other tasks, another type, other code ...), a name
alone does not tell its rows apart; ``apart`` says in a few words what they differ in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from dyndepth.cells.identity import CHAT, IDENTITY, METHOD_KEYS, UNHASHED
from dyndepth.cells.recipe import NONE, shortened
from dyndepth.common.errors import UserError
from dyndepth.common.provenance import VERSIONS
from dyndepth.common.registry import method_class, methods
from dyndepth.common.spec import parameters_of

SETTING = tuple(key for key in IDENTITY if key not in METHOD_KEYS | UNHASHED)
"""Columns that the cells of one setting share, and those of another do not all."""

FITTED = ("fit_version", "corpus_fingerprint", "method_code")
"""Columns that tell two fits of one method apart; other methods differ in them anyway."""

MODEL = ("model", "model_fingerprint", "tokenizer_fingerprint", "revision")
_WORDS = {
    "model_fingerprint": "weights",
    "tokenizer_fingerprint": "tokenizer",
    "attn_implementation": "attention",
    "data_fingerprint": "data",
    "corpus_fingerprint": "corpus",
    "chat_template_fingerprint": "template",
    "fewshot_as_multiturn": "few-shot turns",
    "system_instruction": "system",
    "harness_code": "code",
}
"""Column -> what people call it, if that is not its name."""
_DIGESTS = frozenset(key for key in IDENTITY if key.endswith(("_fingerprint", "_code")))
_FIRST = 6
"""Digits of a digest that people are shown, if they suffice."""


def label(row: Mapping[str, Any]) -> str:
    """``method(parameter=value, ...) + recovery`` of a row that has the columns ``method``,
    ``parameters``, ``phases`` and ``recovery``, the last two at will."""
    inside = ", ".join(changed(row))
    name = f"{row['method']}({inside})" if inside else str(row["method"])
    recovery = recovered(row)
    return name if recovery == NONE else f"{name} + {recovery}"


def changed(row: Mapping[str, Any]) -> list[str]:
    """Those of a row's parameters that differ from the method's defaults, as ``name=value``; all
    of them if the method is not installed. Phases count as a parameter, but of lossless methods:
    they draft what is generated and have no others. A text that cannot be read stands as it is."""
    name, written = str(row["method"]), str(row["parameters"] or "")
    try:
        given = parameters_of(f"{name}({written})", "method") if written else {}
    except UserError:
        return [written]
    defaults = {f.name: f.default for f in fields(method_class(name))} if name in methods() else {}
    found = [
        f"{key}={_plain(value)}"
        for key, value in given.items()
        if key not in defaults or defaults[key] != value
    ]
    phases = row.get("phases") or "both"
    return found if phases == "both" or _lossless(row) else [*found, f"phases={phases}"]


def _lossless(row: Mapping[str, Any]) -> bool:
    """Whether a row is of a method that drafts, by its column ``lossless``; where it has none, by
    the installed method."""
    told, name = row.get("lossless"), str(row["method"])
    if told is None or told == "":
        return name in methods() and method_class(name).speculates
    return str(told).lower() == "true"


def remark(row: Mapping[str, Any]) -> str:
    """What the method says of a row's parameters beside its name (``remarks``); empty: nothing."""
    name, written = str(row["method"]), str(row["parameters"] or "")
    if name not in methods():
        return ""
    cls = method_class(name)
    try:
        given = parameters_of(f"{name}({written})", "method") if written else {}
    except UserError:
        return ""
    values = {each.name: given.get(each.name, each.default) for each in fields(cls)}
    return ", ".join(filter(None, (said.get(values[key]) for key, said in cls.remarks.items())))


def titled(row: Mapping[str, Any]) -> str:
    """``label`` and ``remark``, for people to read."""
    said = remark(row)
    return f"{label(row)} [{said}]" if said else label(row)


def recovered(row: Mapping[str, Any]) -> str:
    """A row's recovery for people; ``none`` if there is none."""
    return shortened(str(row.get("recovery") or NONE))


def apart(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each row what its setting has and that of another row has not, as ``["bfloat16",
    "tasks=quartz", "code=1a2b3c"]``: nothing where all rows have one setting.

    ``rows`` have the columns ``identity.IDENTITY``, as tables write them. The model is told where
    models or their weights differ, so that rows of two settings never have the same words. Where
    rows of one name and setting come from two fits (``FITTED``), that is told too.
    """
    keys = [key for key in ("model", *SETTING) if len({_entry(row, key) for row in rows}) > 1]
    models = {_entry(row, "model") for row in rows}
    if len(models) == len({tuple(_entry(row, key) for key in MODEL) for row in rows}):
        # The name says it all.
        keys = [key for key in keys if key not in MODEL[1:]]
    for key in ("chat_template_fingerprint", "fewshot_as_multiturn"):
        # With a template for some and none for others, it is the same template mostly.
        others = [each for each in keys if each != key and each in CHAT]
        if key in keys and _kinds(rows, others) == _kinds(rows, [*others, key]):
            keys.remove(key)
    words = _words(rows, keys)
    alike = defaultdict(list)
    for place, row in enumerate(rows):
        alike[label(row), *words[place]].append(place)
    for places in alike.values():
        own = [rows[place] for place in places]
        differing = [key for key in FITTED if len({_entry(row, key) for row in own}) > 1]
        for place, more in zip(places, _words(own, differing), strict=True):
            words[place] = words[place] + more
    return words


def lettered(
    rows: Sequence[Mapping[str, Any]], runs: Mapping[str, Sequence[str]] | None = None
) -> tuple[list[str], list[str]]:
    """A letter for each row's setting, and what each letter stands for: ``A: results/one, bfloat16,
    limit=200``. Those of the run that was given first come first, then those of the first row. No
    letters where all rows have one setting.

    ``rows`` as for ``apart``; ``runs``: the hash of a row's cell -> where it was read, the runs in
    the order in which they were given (``merging.origins``).
    """
    words = [tuple(found) for found in apart(rows)]
    # The first run that holds a cell; a setting's place is that of its first run.
    holds = {cell: next(iter(where), "") for cell, where in (runs or {}).items()}
    given = {run: place for place, run in enumerate(dict.fromkeys(holds.values()))}
    first: dict[tuple[str, ...], int] = {}
    for row, setting in zip(rows, words, strict=True):
        place = given.get(holds.get(_entry(row, "cell"), ""), len(given))
        first[setting] = min(place, first.get(setting, place))
    settings = sorted(first, key=lambda setting: first[setting])
    if len(settings) < 2:
        return [""] * len(rows), []
    names = {setting: letter(place) for place, setting in enumerate(settings)}
    read: dict[str, dict[str, None]] = defaultdict(dict)
    for row, setting in zip(rows, words, strict=True):
        read[names[setting]] |= dict.fromkeys((runs or {}).get(_entry(row, "cell"), ()))
    told = [", ".join((*read[name], *setting)) for setting, name in names.items()]
    return [names[setting] for setting in words], [
        f"{name}: {text or 'the rest'}" for name, text in zip(names.values(), told, strict=True)
    ]


def letter(place: int) -> str:
    """A to Z, then AA, AB and so on."""
    more, rest = divmod(place, 26)
    return (letter(more - 1) if more else "") + chr(ord("A") + rest)


def _words(rows: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> list[list[str]]:
    """``key=value`` for each row and key, in short where that tells as many rows apart."""
    keys = list(keys)
    short = [[_word(key, _entry(row, key), short=True) for key in keys] for row in rows]
    full = [[_word(key, _entry(row, key), short=False) for key in keys] for row in rows]
    chosen = short if len(set(map(tuple, short))) == len(set(map(tuple, full))) else full
    # What is the same in short is told by another word, as limits by the tasks that they are of.
    same = [len({words[place] for words in chosen}) == 1 for place in range(len(keys))]
    return [[w for w, drop in zip(words, same, strict=True) if not drop] for words in chosen]


def _kinds(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    """How many different values rows have in ``keys``."""
    return len({tuple(_entry(row, key) for key in keys) for row in rows})


def _entry(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None else str(value)


def _word(key: str, value: str, short: bool) -> str:
    if key in ("model", "dtype"):
        return value
    if key == "apply_chat_template" and value in ("", "default"):
        return "chat template" if value else "plain text"
    if key in _DIGESTS and short:
        value = value[:_FIRST]
    elif key in VERSIONS:
        value = value.removeprefix(f"{key}==")
    elif key == "tasks":
        names = value.split(",")
        more = len(names) - 2
        value = "+".join([*names[:2], f"{more} more"] if short and more > 1 else names)
    elif key == "limit":
        counts = dict.fromkeys(part.rpartition("=")[2] for part in value.split(","))
        value = next(iter(counts)) if short and len(counts) == 1 else value.replace(",", "+")
        value = value or "all"
    elif key == "num_fewshot":
        value = value or "by task"
    return f"{_WORDS.get(key, key)}={value or NONE}"


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
