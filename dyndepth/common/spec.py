"""Texts of the form ``name(parameter=value, ...)``: read, and checked against a dataclass's fields.

Nothing is evaluated. Methods and recovery recipes are both written this way.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
import types
import warnings
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dyndepth.common.errors import UserError

_SPEC = re.compile(r"\s*([\w.-]*)\s*(?:\((.*)\))?\s*", re.DOTALL)
_INTEGER = re.compile(r"[+-]?\d+")


def split(text: str) -> list[str]:
    """The entries between the commas that stand outside of parentheses and quotes.

    Raises UserError for an unbalanced parenthesis or quote, or an empty entry.
    """
    parts, depth, quote, escaped = [""], 0, "", False
    for character in text:
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
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


def name_of(spec: str, kind: str) -> str:
    """The name that ``spec`` leads with; ``kind`` is what it names, for the UserError."""
    return _match(spec, kind)[1]


def parameters_of(spec: str, kind: str) -> dict[str, Any]:
    """The parameters in the brackets of ``spec``, in order; none where there are no brackets.

    Values are integers, floats, true/false, none, or text, bare or in quotes. Raises UserError for
    a spec that can't be read or a parameter that is given twice.
    """
    return dict(_parameters_of(spec, kind))


@lru_cache(maxsize=4096)
def _parameters_of(spec: str, kind: str) -> dict[str, Any]:
    """``parameters_of``, shared: tables ask for the same few of some thousand rows."""
    inside = _match(spec, kind)[2]
    given: dict[str, Any] = {}
    for part in split(inside or ""):
        parameter, equals, written = (piece.strip() for piece in part.partition("="))
        if not (equals and written and parameter.isidentifier()):
            raise UserError(
                f"{part.strip()!r} in the {kind} spec {spec.strip()!r} can't be read; "
                "write parameter=value"
            )
        if parameter in given:
            raise UserError(f"{parameter!r} is given twice in the {kind} spec {spec.strip()!r}")
        given[parameter] = value(written)
    return given


def value(text: str) -> Any:
    """An integer, float, true/false, none, or text, bare or in quotes; nothing is evaluated."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return _unquoted(text)
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        # Python refuses to read integers of some thousand digits.
        return int(text) if _INTEGER.fullmatch(text) else float(text)
    except ValueError:
        return text


def checked(
    cls: Any, owner: str, given: dict[str, Any], hidden: Collection[str] = ()
) -> dict[str, Any]:
    """``given`` with each value checked against its field of the dataclass ``cls``.

    An int becomes a float where the field is one, so that equal settings have equal reprs. Fields
    in ``hidden`` can't be given. Raises UserError, in the name of ``owner``, for an unknown
    parameter (with the nearest names) or a value of the wrong kind.
    """
    fields = {f.name for f in dataclasses.fields(cls) if f.init and f.name not in hidden}
    hints = get_type_hints(cls)
    found = {}
    for parameter, value in given.items():
        if parameter not in fields:
            raise UserError(
                f"{owner} has no parameter {parameter!r}; {nearest(parameter, fields)}"
                f"it has {', '.join(sorted(fields))}"
            )
        fits, found[parameter] = _coerce(value, hints[parameter])
        if not fits:
            raise UserError(
                f"parameter {parameter!r} of {owner} must be "
                f"{_describe(hints[parameter])}, not {value!r}"
            )
    return found


def nearest(name: str, known: Iterable[str], before: str = "") -> str:
    """``"did you mean ...? "``, or nothing if no known name begins with ``name`` or resembles it;
    ``before`` is put before each."""
    names = sorted(known)
    begun = [each for each in names if name and each.startswith(name)]
    alike = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    near = list(dict.fromkeys([*begun, *alike]))[:3]
    return f"did you mean {' or '.join(before + each for each in near)}? " if near else ""


def _match(spec: str, kind: str) -> re.Match[str]:
    match = _SPEC.fullmatch(spec)
    if match is None or not match[1]:
        raise UserError(
            f"the {kind} spec {spec.strip()!r} can't be read; write name or "
            "name(parameter=value, ...)"
        )
    return match


def _unquoted(text: str) -> str:
    """What stands in the quotes, escapes read as Python writes them, so that reprs come back."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash that escapes nothing
            found = ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        found = None
    return found if isinstance(found, str) else text[1:-1]


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
        try:
            return (True, float(value)) if number else (False, value)
        except OverflowError:  # an integer beyond every float
            return False, value
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
