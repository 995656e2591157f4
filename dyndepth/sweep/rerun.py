"""The command that computes a cell again, from its identity alone.

What an identity knows by its fingerprint only has a placeholder there: the path of task files or of
a text of one's own (``--include_path``, ``--corpus``).
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dyndepth.cells.cell import DENSE, Cell, CellSpec, method_identity
from dyndepth.cells.identity import Row, setting, today
from dyndepth.cells.recipe import NONE, shortened
from dyndepth.common.commands import CHOICES
from dyndepth.common.errors import UserError
from dyndepth.common.paths import EMBEDDED
from dyndepth.common.spec import parameters_of, value
from dyndepth.data.corpus import EMBEDDED_TEXT
from dyndepth.sweep.grid import plans
from dyndepth.sweep.settings import OTHERS, Settings, limit_text, read, settings

PROGRAM = ("python", "-m", "dyndepth.sweep")
OUTPUT = "runs/again"
"""Where the printed commands write, unless told otherwise: not where the run itself lies."""

MADE_WITH = ("git_commit", "torch", "transformers", "lm_eval", "dyndepth", "harness_code")
OF_METHOD = ("method", "parameters", "phases", "target_speedup", "seed", "recovery")
"""Keys of an identity that tell which plan of a sweep is the cell's."""

PLACEHOLDERS = {"include_path": "FOLDER_OF_TASK_FILES", "corpus": "FILE_OF_TEXT"}
"""Flags whose value no identity holds, and what stands there in a printed command."""
OWN = {
    "include_path": "task files of its own (data fingerprint {data_fingerprint})",
    "corpus": "a text of its own (corpus fingerprint {corpus_fingerprint})",
}

Flags = dict[str, tuple[str, ...]]
"""A sweep's flags, each with its entries."""


def command(identity: Row, **more: Any) -> list[str]:
    """The words of the command that computes the cell of ``identity``, and dense beside it.

    Flags that would say what the sweep does anyway are left out. ``more`` are further flags, or
    others instead; one that is None is left to the identity. ``PLACEHOLDERS`` stand where it does
    not know. ``shlex.join`` makes a line of it.
    """
    return [*PROGRAM, *_words(_flags(identity), more)]


def missing(identity: Row, given: Mapping[str, Any]) -> list[str]:
    """Those of ``PLACEHOLDERS`` that the cell of ``identity`` needs and that are not ``given``."""
    parts = str(identity["data_fingerprint"]).split("+")
    text = today(identity["corpus_fingerprint"])
    own = {
        "include_path": any(re.fullmatch(r"[0-9a-f]{12}", part) for part in parts),
        "corpus": bool(re.fullmatch(r"[0-9a-f]{16}", text)) and text != EMBEDDED_TEXT,
    }
    return [flag for flag, needed in own.items() if needed and given.get(flag) is None]


def check_given(
    identity: Row, given: Mapping[str, Any], flags: Iterable[str] = tuple(PLACEHOLDERS)
) -> None:
    """Raises UserError for the first of ``flags`` that ``missing`` finds."""
    for flag in missing(identity, given):
        if flag in flags:
            raise UserError(f"this run used {OWN[flag].format(**identity)}: give --{flag}")


def commands(identities: Iterable[Row]) -> list[str]:
    """The fewest lines that this module finds which compute all cells of ``identities``.

    Cells that differ in their seed, target speedup, method or recovery alone share a line where
    the line makes nothing that was not asked for, except the dense cells that every sweep makes.
    """
    found = list(identities)
    others = {_control(each) for each in found if each["method"] != DENSE}
    wanted = [x for x in found if x["method"] != DENSE or _control(x) not in others]
    groups = [_flags(identity) for identity in wanted]
    for name in ("seed", "speedups", "methods", "recovery"):
        groups = _merged(groups, name)
    return [shlex.join([*PROGRAM, *_words(flags, {})]) for flags in groups]


def settings_of(identity: Row, **more: Any) -> Settings:
    """What the sweep makes of ``command``. Raises UserError if this version refuses it, or if it
    needs a flag that no identity holds and that is not among ``more``."""
    check_given(identity, more)
    return read(command(identity, **more)[len(PROGRAM) :])


def plan_of(identity: Row, wanted: Settings, layers: int) -> CellSpec:
    """The cell's plan among those of a sweep with the settings ``wanted``, as ``settings_of`` gives
    them, on a model of ``layers`` blocks.

    Raises:
        UserError: this version's method is another one, or has other parameters.
    """
    for plan in plans(wanted, layers):
        own = method_identity(plan.build(), plan.recovery)
        if all(own[key] == identity[key] for key in OF_METHOD):
            return plan
    raise UserError(
        f"the method {identity['method']!r} or its recovery has changed since this cell was made: "
        "no plan of this version has its identity"
    )


def made_with(identity: Row) -> str:
    """Commit, packages and code that a cell was made with, in a few words."""
    return ", ".join(f"{key} {identity[key] or 'unknown'}" for key in MADE_WITH)


def chosen(cells: Sequence[Cell], prefixes: Sequence[str]) -> list[Cell]:
    """The cells whose hash begins with one of ``prefixes``; all of them if there is none.

    Raises:
        UserError: a prefix that no cell has.
    """
    for prefix in prefixes:
        if not any(cell.key.startswith(prefix) for cell in cells):
            raise UserError(f"no cell's hash begins with {prefix!r}; the first column of a table")
    return [cell for cell in cells if not prefixes or cell.key.startswith(tuple(prefixes))]


def _control(identity: Row) -> tuple[Any, ...]:
    """Which dense cell the sweep makes beside the cell of ``identity``."""
    recovery = identity["recovery"]
    return setting(identity), recovery, 0 if recovery == NONE else identity["seed"]


def _spec(method: str, parameters: str) -> str:
    """A method as ``--methods`` takes it: texts without the quotes of their reprs where they are
    read alike."""
    if not parameters:
        return method
    found = []
    for name, given in parameters_of(f"{method}({parameters})", "method").items():
        bare = isinstance(given, str) and re.fullmatch(r"[\w.-]+", given) and value(given) == given
        found.append(f"{name}={given if bare else repr(given)}")
    return f"{method}({', '.join(found)})"


def _flags(identity: Row) -> Flags:
    """Every flag that an identity decides."""
    spec = _spec(str(identity["method"]), str(identity["parameters"]))
    attention = str(identity["attn_implementation"])
    flags = {
        "model": identity["model"],
        "methods": "" if spec == DENSE else spec,
        "speedups": _number(identity["target_speedup"]),
        "seed": identity["seed"],
        "phases": identity["phases"],
        "recovery": shortened(str(identity["recovery"])),
        "tasks": ",".join(identity["tasks"]),
        "limit": limit_text(_limit(identity["limit"])),
        **{name: identity[name] for name in ("sample_seed", "num_fewshot", "batch_size")},
        **{name: identity[name] for name in ("apply_chat_template", "system_instruction")},
        # With a template they are turns unless told otherwise.
        "fewshot_as_multiturn": "no" if identity["fewshot_as_multiturn"] == "no" else "",
        "dtype": identity["dtype"],
        "device": identity["device"],
        # A kernel that no flag can name was the model's own choice.
        "attn_implementation": attention if attention in CHOICES["attn_implementation"] else "",
        "revision": revision_of(identity),
    }
    flags |= {flag: PLACEHOLDERS[flag] for flag in missing(identity, {})}
    return {name: (str(text),) for name, text in flags.items()}


def revision_of(identity: Row) -> str:
    """The hub's revision that an identity names; empty where what it names is the embedded model's
    wheel or the content of a folder."""
    own = str(identity["revision"] or "")
    return "" if identity["model"] == EMBEDDED or ":" in own else own


def _number(number: float) -> str:
    brief = f"{number:g}"
    return brief if float(brief) == number else repr(float(number))


def _limit(limit: Mapping[str, int | None]) -> dict[str, int | None]:
    """Documents by task, the commonest number once for all tasks that are not named."""
    usual = Counter(limit.values()).most_common(1)[0][0]
    return {OTHERS: usual} | {task: n for task, n in limit.items() if n != usual}


def _usual(model: str, tasks: str) -> dict[str, str]:
    """What the flags are if they are not given."""
    from dyndepth.tasks import OFFLINE, resolve

    default = settings({"model": model})
    offline = set(tasks.split(",")) <= set(OFFLINE)
    suite = resolve(default.tasks)
    limit = {task: default.limit.get(task, default.limit[OTHERS]) for task in tasks.split(",")}
    names = ("phases", "sample_seed", "batch_size", "device", "dtype")
    return {name: str(getattr(default, name)) for name in names} | {
        # As the tasks' own files say: the offline ones say 0, of others nothing is known here.
        "num_fewshot": "0" if offline else str(default.num_fewshot),
        "model": EMBEDDED,
        "methods": default.methods,
        "seed": ",".join(map(str, default.seed)),
        "recovery": ",".join(default.recovery),
        "tasks": ",".join(suite),
        "limit": limit_text(_limit(limit)),
        **dict.fromkeys(("apply_chat_template", "system_instruction", "fewshot_as_multiturn"), ""),
        "attn_implementation": "",
        "revision": "",
    }


def _words(flags: Flags, more: Mapping[str, Any]) -> list[str]:
    given = {name: ",".join(filter(None, entries)) for name, entries in flags.items()}
    given |= {name: str(text) for name, text in more.items() if text is not None}
    usual = _usual(given["model"], given["tasks"])
    words = []
    for name, text in given.items():
        if usual.get(name) != text:
            words += [f"--{name}", text]
    return words


def _merged(groups: Sequence[Flags], name: str) -> list[Flags]:
    """Groups that differ in the flag ``name`` alone, as one."""
    found: dict[tuple[tuple[str, Any], ...], Flags] = {}
    for flags in groups:
        rest = tuple((key, entries) for key, entries in flags.items() if key != name)
        known = found.setdefault(rest, flags | {name: ()})
        known[name] = tuple(dict.fromkeys([*known[name], *flags[name]]))
    return list(found.values())
