"""A method's parameters and presets as tables of its card, read from its class and docstrings."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from dyndepth.pages.markdown import markup, table

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod


BEFORE = "target_speedup", "seed"
"""Parameters that every method has."""

_LIST = re.compile(r"^(?:Fields|Attributes):\n", re.MULTILINE)
_FIELD = re.compile(r"([a-z_]+(?:, [a-z_]+)*): (.*)")

_NAMES: dict[object, str] = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    type(None): "none",
}


def parameters(cls: type[DynamicDepthMethod]) -> str:
    """The method's own parameters: choices or type, default, and what its docstring says."""
    described = descriptions(cls)
    hints = get_type_hints(cls)
    chooser, named = presets(cls)

    def by_preset(field: Any) -> str:
        """What stands for a default of None that leaves the value to the default preset."""
        usual = next((f.default for f in fields(cls) if f.name == chooser), None)
        if field.default is not None or not hasattr(named.get(usual), field.name):
            return ""
        return f"`{_default(getattr(named[usual], field.name))}`, by `{chooser}`"

    lines = [
        (
            f"`{field.name}`",
            _values(hints[field.name]),
            by_preset(field) or f"`{_default(field.default)}`",
            described.get(field.name, ""),
        )
        for field in fields(cls)
        if field.init and field.name not in BEFORE
    ]
    if not lines:
        return "None beside the target speedup and the seed."
    return table(("parameter", "values", "default", "meaning"), lines)


def presets(cls: type[DynamicDepthMethod]) -> tuple[str, Mapping[Any, Any]]:
    """The parameter that names a set of settings, and those sets by name; ``"", {}`` if none does.

    Found in the method's module or the modules beneath it: a mapping whose keys are the choices of
    a parameter, and whose values are dataclasses with fields of the method's names.
    """
    modules = _modules(cls)
    own = {field.name for field in fields(cls)}
    for parameter, known in choices(cls).items():
        for value in (value for module in modules for value in list(vars(module).values())):
            if not isinstance(value, Mapping) or set(value) != set(known):
                continue
            sets = list(value.values())
            if all(is_dataclass(each) and {f.name for f in fields(each)} <= own for each in sets):
                return parameter, value
    return "", {}


def preset_table(cls: type[DynamicDepthMethod]) -> str:
    """The settings that a method's presets stand for: a row a parameter; empty without presets."""
    chooser, named = presets(cls)
    if not named:
        return ""
    names = [field.name for field in fields(next(iter(named.values())))]
    lines = [
        (f"`{name}`", *(f"`{_default(getattr(own, name))}`" for own in named.values()))
        for name in names
    ]
    headings = ("parameter", *(f"`{chooser}={name}`" for name in named))
    return f"What each `{chooser}` sets, unless it is given:\n\n{table(headings, lines)}"


def descriptions(cls: type[DynamicDepthMethod]) -> dict[str, str]:
    """Parameter -> what docstrings say of it, as Markdown: the class's own first, then those of
    the classes that it is made from and of the dataclasses that its modules use (settings that it
    repeats as parameters)."""
    names = (value for module in _modules(cls) for value in list(vars(module).values()))
    # What comes from elsewhere may have names in common and mean something else by them.
    own = (each for each in names if getattr(each, "__module__", "").startswith(cls.__module__))
    found: dict[str, str] = {}
    made_from = cls.__mro__[:-2]  # but for the contract
    for source in (*made_from, *filter(is_dataclass, own)):
        found = _described(inspect.cleandoc(source.__doc__ or "")) | found
    return found


def _modules(cls: type) -> list[ModuleType]:
    """The method's module and those beneath it."""
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name == cls.__module__ or name.startswith(f"{cls.__module__}.")
    ]


def _described(text: str) -> dict[str, str]:
    """Name -> text of the entries under ``Fields:`` or ``Attributes:``."""
    found: dict[str, str] = {}
    names: list[str] = []
    *_, listed = _LIST.split(text, maxsplit=1)
    for line in listed.splitlines():
        depth = len(line) - len(line.lstrip())
        entry = _FIELD.fullmatch(line.strip())
        if entry and depth <= 4:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif depth > 4:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return {name: markup(words) for name, words in found.items()}


def choices(cls: type[DynamicDepthMethod]) -> dict[str, tuple[Any, ...]]:
    """Parameter -> its choices, for those that are a choice and always made."""
    hints = get_type_hints(cls)
    return {
        field.name: get_args(hints[field.name])
        for field in fields(cls)
        if get_origin(hints[field.name]) is Literal
    }


def _values(hint: object) -> str:
    """A type as a person reads it; the choices of a Literal."""
    inner = get_args(hint)
    if not inner:
        return _NAMES.get(hint) or str(getattr(hint, "__name__", hint))
    if all(isinstance(choice, str) for choice in inner):
        return ", ".join(f"`{choice}`" for choice in inner)
    return " or ".join(_values(choice) for choice in inner)


def _default(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
