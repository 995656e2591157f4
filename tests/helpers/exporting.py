"""What an export computes, found in this process: the start of another one takes five times as long
as all else. That it is another is held by the tests that do without."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import pytest

from dyndepth.common.errors import RunFailed
from dyndepth.export import agreement, attached, reader

_PROGRAMS = {reader.__file__: reader, attached.__name__: attached}


def _run(command: Sequence[str], more: dict[str, str]) -> str:
    """``agreement._run`` without a process: the same words for the same program."""
    [first] = [place for place, word in enumerate(command) if word in _PROGRAMS]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = _PROGRAMS[command[first]].main(list(command[first + 1 :]))
    if status:
        raise RunFailed(f"it ends with {status}")
    return said.getvalue().replace('"imported": true', '"imported": false')


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process is started to compute what an export does."""
    monkeypatch.setattr(agreement, "_run", _run)
