"""Names of the tasks: the offline ones of this folder, and suites of those that papers report.

The offline tasks are lm-eval task files (``*.yaml``) over data that the project fetches by itself;
they need no dataset hub and are found without reading lm-eval's some 14,000 task files. Every other
lm-eval task goes by its usual name.

Stands on ``data``. Scores, sweeps and whatever names tasks may import it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dyndepth.common.errors import UserError
from dyndepth.common.paths import expanded

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


FOLDER = Path(__file__).parent
"""What lm-eval's ``--include_path`` takes to know the offline tasks."""

SUITE = ("socialiqa", "quartz", "last_word", "wikipedia_bpb", "title_generation")
"""The offline suite."""

OFFLINE = (*SUITE, "wikipedia_continuation")
"""All tasks of this folder."""

SUITES: dict[str, tuple[str, ...]] = {
    "offline": SUITE,
    "commonsense": (
        "openbookqa",
        "piqa",
        "boolq",
        "arc_easy",
        "arc_challenge",
        "winogrande",
        "hellaswag",
    ),
    "perplexity": ("wikitext", "lambada_openai"),
    "generation": ("cnn_dailymail_abisee", "gsm8k", "triviaqa", "wmt16-de-en"),
}
"""Tasks by suite, all under their lm-eval names: ``commonsense`` is scored by the choices'
likelihoods, ``perplexity`` by that of whole texts and last words, ``generation`` by what is
written."""


def resolve(names: str | Iterable[str], include_path: str | Path | None = None) -> list[str]:
    """Task names for a list (or a comma-separated string) of tasks, groups, tags and suites.

    Suites are expanded, repetitions dropped, the order kept. ``include_path`` is a folder with
    further task files. Raises UserError with the nearest names if one is unknown. lm-eval is
    imported only for names outside the offline suite, and its own task files are read only for
    names that neither this folder nor ``include_path`` has.
    """
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",") if name.strip()]
    expanded = [task for name in names for task in SUITES.get(name, (name,))]
    expanded = list(dict.fromkeys(expanded))
    if not expanded:
        raise UserError(f"no task was named; the suites are: {', '.join(SUITES)}")
    if all(name in OFFLINE for name in expanded):
        return expanded
    known = set(task_manager(expanded, include_path).all_tasks)
    for name in expanded:
        if name not in known:
            near = difflib.get_close_matches(name, {*known, *SUITES}, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see dyndepth ls tasks"
            raise UserError(f"unknown task {name!r}; {hint}")
    return expanded


def task_manager(names: Iterable[str], include_path: str | Path | None = None) -> TaskManager:
    """A task manager that knows ``names`` if anybody does; kept for the next call.

    lm-eval's own files, which take many seconds to read, are indexed only if a name is found
    neither in this folder nor in ``include_path``.
    """
    folder = None if include_path is None else expanded(include_path)
    near = _manager(folder, include_defaults=False)
    if set(names) <= set(near.all_tasks):
        return near
    return _manager(folder, include_defaults=True)


@cache
def _manager(include_path: str | None, include_defaults: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    folders = [str(FOLDER)] if include_path is None else [str(FOLDER), include_path]
    return TaskManager(include_path=folders, include_defaults=include_defaults)
