"""Finds the methods: the entry-point group ``dyndepth.methods``, by name and by spec.

A spec is what stands on a command line: ``name`` or ``name(parameter=value, ...)``.
"""

from __future__ import annotations

import functools
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from dyndepth.common.culprits import culprit, definition, import_failure
from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.common.spec import checked, name_of, nearest, parameters_of, split
from dyndepth.common.trees import check_one_tree

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod


GROUP = "dyndepth.methods"
"""Of entry points; and the package of the methods that come with the suite."""


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
    """The class of method ``name``. Raises UserError, with the nearest names, if none is, and with
    file and line if it cannot be imported."""
    if name not in methods():
        raise UserError(
            f"unknown method {name!r}; {nearest(name, methods())}see `dyndepth ls methods`"
        )
    check_one_tree()
    try:
        loaded: type[DynamicDepthMethod] = methods()[name].load()
    except Exception as fault:  # whatever a method's file does while it is read
        raise UserError(
            f"method {name!r} cannot be imported from {methods()[name].value}: "
            f"{import_failure(fault, methods()[name].module)}"
        ) from fault
    return loaded


def is_shipped(name: str) -> bool:
    """True for a method that comes with the suite; False for a user's own, installed or not."""
    entry = methods().get(name)
    return entry is not None and entry.value.startswith(f"{GROUP}.")


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
        method = chosen(**values)
    except ValueError as error:
        raise UserError(f"method {name!r}: {error}") from error
    except TypeError as error:
        place = culprit(error)
        raise UserError(f"method {name!r}: {error}" + f" ({place})" * bool(place)) from error
    if not hasattr(method, "tensors"):
        raise UserError(
            f"method {name!r} does not call super().__post_init__() "
            f"({definition(chosen.__post_init__)})"
        )
    return method


def phases_given(name: str, parameters: dict[str, Any], asked: str) -> dict[str, str]:
    """What ``--phases asked`` adds to the ``parameters`` of a method: nothing where it has no
    choice, as a method that speculates, or the user made one."""
    cls = method_class(name)
    if "phases" in parameters or not any(f.name == "phases" for f in fields(cls)):
        return {}
    if cls.speculates:  # drafts are of what is generated, whatever the others do
        return {}
    wanted = cls.published_phases if asked == "published" else asked
    return {} if wanted is None else {"phases": wanted}


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
