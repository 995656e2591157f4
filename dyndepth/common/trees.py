"""Whether the suite and its methods are of one checkout; little is imported for it, as every
command asks."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from dyndepth.common.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


@cache
def check_one_tree() -> None:
    """Raises UserError if this package and its methods come from different folders: a second
    checkout that is not installed, say, in an environment of the first. Looked at once, if they
    are of one: a table of some thousand rows asks for each."""
    found = find_spec("dyndepth.methods")
    here = "run `pip install -e .` in the one that you mean, or use its own environment"
    if found is None or found.origin is None:
        raise UserError(f"there are no methods beside {_PACKAGE}; {here}")
    methods = Path(found.origin).resolve().parent
    if methods not in (_PACKAGE / "methods", _PACKAGE.parent / "methods"):
        raise UserError(f"the suite is of {_PACKAGE}, but its methods are of {methods}; {here}")
