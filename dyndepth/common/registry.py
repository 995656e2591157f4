"""Finds the methods: the entry-point group ``dyndepth.methods``, by name and by spec.

A spec is what stands on a command line: ``name`` or ``name(parameter=value, ...)``.
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.common.spec import checked, name_of, nearest, parameters_of, split

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod


GROUP = "dyndepth.methods"
"""Of entry points; and the package of the methods that come with the suite."""

_PACKAGE = Path(__file__).resolve().parents[1]


def check_one_tree() -> None:
    """Raises UserError if this package and its methods come from different folders: a second
    checkout that is not installed, say, in an environment of the first."""
    found = find_spec(GROUP)
    here = "run `pip install -e .` in the one that you mean, or use its own environment"
    if found is None or found.origin is None:
        raise UserError(f"there are no methods beside {_PACKAGE}; {here}")
    methods = Path(found.origin).resolve().parent
    if methods not in (_PACKAGE / "methods", _PACKAGE.parent / "methods"):
        raise UserError(f"the suite is of {_PACKAGE}, but its methods are of {methods}; {here}")


@functools.cache
def methods() -> dict[str, EntryPoint]:
    """Name -> entry point of every installed method, sorted by name; nothing is imported.

    Raises UserError if two distributions claim one name for different classes.
    """
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        first = found.setdefault(entry.name, entry)
        if first.value != entry.value:
            raise UserError(
                f"two methods are called {entry.name!r} ({first.value} and {entry.value}); "
                "uninstall or rename one"
            )
    return found


def method_class(name: str) -> type[DynamicDepthMethod]:
    """The class of method ``name``. Raises UserError, with the nearest names, if none is."""
    if name not in methods():
        raise UserError(
            f"unknown method {name!r}; {nearest(name, methods())}see `dyndepth ls methods`"
        )
    check_one_tree()
    entry = methods()[name]
    try:
        loaded: type[DynamicDepthMethod] = entry.load()
    except ModuleNotFoundError as fault:
        if not f"{entry.module}.".startswith(f"{fault.name}."):
            raise  # a library that the method needs
        raise UserError(
            f"method {name!r} is installed as {entry.value}, but there is no {fault.name}; "
            "install what it is part of again, as by `pip install -e .`"
        ) from None
    return loaded


def distribution(name: str) -> str:
    """``package==version`` of the distribution that offers method ``name``; empty where none does,
    as for a class of a notebook."""
    entry = methods().get(name)
    package = None if entry is None else entry.dist
    return "" if package is None else f"{package.name}=={package.version}"


def parse_methods(text: str) -> list[tuple[str, dict[str, Any]]]:
    """``"one,two(a=1, b=saturation)"`` as ``[("one", {}), ("two", {"a": 1, "b": "saturation"})]``.

    Values are integers, floats, true/false, none, or text, bare or in quotes; nothing is
    evaluated. Each is checked against its field. Raises UserError for a spec that can't be read,
    an unknown method or parameter (with the nearest names), or a value of the wrong kind.
    """
    parsed = [_parse(spec) for spec in split(text)]
    if not parsed:
        raise UserError("no method given; name at least one, as in --methods dense")
    return parsed


def load_method(spec: str, **parameters: Any) -> DynamicDepthMethod:
    """The method that ``spec`` (a name, or a spec with parameters) and ``parameters`` describe.

    ``parameters`` win over those of the spec. Raises UserError as ``parse_methods`` does, and
    if the method itself refuses the values.
    """
    parsed = parse_methods(spec)
    if len(parsed) != 1:
        raise UserError(f"{spec!r} names {len(parsed)} methods; give one")
    name, given = parsed[0]
    chosen = method_class(name)
    values = given | check_parameters(name, parameters)
    try:
        return chosen(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"method {name!r}: {error}") from error


def check_parameters(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """``parameters`` with each value checked against its field; an int becomes a float where
    the field is one, so that equal settings have equal reprs.

    Raises UserError for an unknown parameter or a value of the wrong kind.
    """
    return checked(method_class(name), f"method {name!r}", parameters)


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    if "/" in spec and path_of(spec.strip()).is_dir():
        raise UserError(
            f"{spec.strip()!r} is a folder, and commands take methods by name; in Python, "
            "dyndepth.load_method loads a method that was saved there"
        )
    name = name_of(spec, "method")
    method_class(name)
    return name, check_parameters(name, parameters_of(spec, "method"))
