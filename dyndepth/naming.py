"""The one short name that a row's method has in tables, figures and pages for people.

A name is a function of the row alone: the method, those of its parameters that are not the
installed method's defaults, its phases where they are not both, and its recovery without what is as
by default. Equal settings have equal names everywhere; different ones differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dyndepth.errors import UserError
from dyndepth.recipe import NONE, shortened
from dyndepth.registry import method_class, methods
from dyndepth.spec import parameters_of


def label(row: Mapping[str, Any]) -> str:
    """``method(parameter=value, ...) + recovery`` of a row that has the columns ``method``,
    ``parameters``, ``phases`` and ``recovery``, the last two at will."""
    inside = ", ".join(changed(row))
    name = f"{row['method']}({inside})" if inside else str(row["method"])
    recovery = recovered(row)
    return name if recovery == NONE else f"{name} + {recovery}"


def changed(row: Mapping[str, Any]) -> list[str]:
    """Those of a row's parameters that differ from the method's defaults, as ``name=value``; all
    of them if the method is not installed. Phases count as a parameter; a text that cannot be read
    stands as it is."""
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
    return found if phases == "both" else [*found, f"phases={phases}"]


def recovered(row: Mapping[str, Any]) -> str:
    """A row's recovery for people; ``none`` if there is none."""
    return shortened(str(row.get("recovery") or NONE))


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
