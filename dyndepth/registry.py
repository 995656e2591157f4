"""Finds the methods: the entry-point group ``dyndepth.methods``, by name and by spec.

A spec is what stands on a command line: ``name`` or ``name(parameter=value, ...)``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from dyndepth.errors import UserError

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod

GROUP = "dyndepth.methods"

_SPEC = re.compile(r"\s*([\w.-]*)\s*(?:\((.*)\))?\s*", re.DOTALL)
_INTEGER = re.compile(r"[+-]?\d+")


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
            f"unknown method {name!r}; {_hint(name, methods())}see `python -m dyndepth ls methods`"
        )
    loaded: type[DynamicDepthMethod] = methods()[name].load()
    return loaded


def parse_methods(text: str) -> list[tuple[str, dict[str, Any]]]:
    """``"one,two(a=1, b=saturation)"`` as ``[("one", {}), ("two", {"a": 1, "b": "saturation"})]``.

    Values are integers, floats, true/false, none, or text, bare or in quotes; nothing is
    evaluated. Each is checked against its field. Raises UserError for a spec that can't be read,
    an unknown method or parameter (with the nearest names), or a value of the wrong kind.
    """
    parsed = [_parse(spec) for spec in _split(text)]
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
    chosen = method_class(name)
    fields = {field.name for field in dataclasses.fields(chosen) if field.init}
    hints = get_type_hints(chosen)
    checked = {}
    for parameter, value in parameters.items():
        if parameter not in fields:
            raise UserError(
                f"method {name!r} has no parameter {parameter!r}; {_hint(parameter, fields)}"
                f"it has {', '.join(sorted(fields))}"
            )
        fits, checked[parameter] = _coerce(value, hints[parameter])
        if not fits:
            raise UserError(
                f"parameter {parameter!r} of method {name!r} must be "
                f"{_describe(hints[parameter])}, not {value!r}"
            )
    return checked


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    match = _SPEC.fullmatch(spec)
    if match is None or not match[1]:
        raise UserError(
            f"the method spec {spec.strip()!r} can't be read; write name or "
            "name(parameter=value, ...)"
        )
    name, inside = match[1], match[2]
    method_class(name)
    given: dict[str, Any] = {}
    for part in _split(inside or ""):
        parameter, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and value and parameter.isidentifier()):
            raise UserError(
                f"{part.strip()!r} in the method spec {spec.strip()!r} can't be read; "
                "write parameter=value"
            )
        if parameter in given:
            raise UserError(f"{parameter!r} is given twice in the method spec {spec.strip()!r}")
        given[parameter] = _value(value)
    return name, check_parameters(name, given)


def _split(text: str) -> list[str]:
    """Split at the commas that stand outside of parentheses and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character == "(") - (character == ")")
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
        if depth < 0:
            break
    if depth or quote:
        raise UserError(f"{text.strip()!r} has an unbalanced parenthesis or quote")
    if parts == [""] or not text.strip():
        return []
    if not all(part.strip() for part in parts):
        raise UserError(f"{text.strip()!r} has an empty entry between its commas")
    return parts


def _value(text: str) -> Any:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _coerce(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether ``value`` is what ``hint`` says, and the value as that type."""
    if hint is Any:
        return True, value
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in inner)
        return fits, value
    if origin in (Union, types.UnionType):
        exact = [choice for choice in inner if _coerce(value, choice)[0]]
        exact.sort(key=lambda choice: type(value) is not choice)
        return (True, _coerce(value, exact[0])[1]) if exact else (False, value)
    if hint in (None, type(None)):
        return value is None, value
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return (True, float(value)) if number else (False, value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if isinstance(origin or hint, type):
        return isinstance(value, origin or hint), value
    return True, value


def _describe(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in inner)
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return "none" if hint in (None, type(None)) else names.get(hint, str(hint))


def _hint(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}? " if near else ""
