"""Completion of commands, flags and their values in a shell, by argcomplete.

The shell runs ``dyndepth`` with the line so far in its environment; the parser that would read the
line says what may come next, and the process ends.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

ASKED = "_ARGCOMPLETE"
"""Variable by which the shell asks: from which word of the line on is completed."""


def asked() -> bool:
    """Whether a shell asks what may come next."""
    return ASKED in os.environ


def script(shell: str) -> str:
    """What a shell is to run before it can ask."""
    from argcomplete import shellcode

    return str(shellcode(["dyndepth"], True, shell))


def finished_words() -> list[str]:
    """The words of the line behind ``dyndepth``, but for the one that is being written."""
    from argcomplete import split_line

    return list(split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3][1:])


def offer(parser: argparse.ArgumentParser, words: int, known: Mapping[str, Sequence[str]]) -> None:
    """Say what may come next, where ``parser`` reads what follows so many ``words`` of the command,
    and end. ``known``: values by flag, where the parser leaves the check to others."""
    from argcomplete import autocomplete

    for action in parser._actions:
        if action.dest in known and not action.choices:
            cast(Any, action).completer = partial(_among, known[action.dest])
        if action.dest in ("methods", "method"):
            cast(Any, action).completer = _methods
    os.environ[ASKED] = str(1 + words)
    autocomplete(parser, always_complete_options="long")


def _among(values: Sequence[str], **_: Any) -> Sequence[str]:
    return values


def _methods(prefix: str, **_: Any) -> list[str]:
    before, comma, _last = prefix.rpartition(",")
    from dyndepth.common.registry import methods

    return [f"{before}{comma}{name}" for name in methods()]
