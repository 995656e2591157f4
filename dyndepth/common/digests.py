"""Digests of code, by the place where it stands, and of whatever else can change a number."""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from dyndepth.common.paths import path_of

PACKAGE = Path(__file__).resolve().parent.parent

METHODS = "dyndepth.methods"
"""Import name of the package that holds a file or a folder for each method."""

HARNESS = ("method.py", "models", "data", "tasks", "runtime", "evaluation")
"""Places of the package that every scored cell runs through: they can change its numbers, and
nothing else can but a method and what it was fitted by."""

GROUND = ("method.py", "models", "data", "runtime")
"""Places that every fit runs through."""

CONTRACT, FITTING = f"{PACKAGE.name}.method", f"{PACKAGE.name}.fitting"


@cache
def harness_code() -> str:
    """12 hex digits over all that can change a cell's numbers whatever its method is."""
    return _digest(_placed(HARNESS), PACKAGE)


@cache
def ground_code() -> str:
    """12 hex digits over all that can change what is found on a model, whatever looks for it."""
    return _digest(_placed(GROUND), PACKAGE)


@cache
def timing_code() -> str:
    """12 hex digits over the procedure by which times are taken; no part of any identity."""
    return _digest(_placed(("timing",)), PACKAGE)


@cache
def placed_code(*places: str) -> str:
    """12 hex digits over these files and folders of the package, whatever they are for."""
    return _digest(_placed(places), PACKAGE)


@cache
def fitting_code(*modules: str) -> str:
    """12 hex digits over modules of ``dyndepth.fitting``, what they import of that room at any
    depth, and the ground under it."""
    return _digest([*_fitting(modules), *_placed(GROUND)], PACKAGE)


def _placed(places: Iterable[str]) -> list[Path]:
    """The source and task files of the package in these folders, or of these names."""
    found: list[Path] = []
    for place in places:
        path = PACKAGE / place
        found += [path] if path.is_file() else path.rglob("*")
    return [path for path in found if path.suffix in {".py", ".yaml", ".yml"}]


def _fitting(modules: Iterable[str]) -> list[Path]:
    """Files of ``dyndepth.fitting`` that are read for these modules, at any depth of imports."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = PACKAGE.joinpath(*name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or not f"{name}.".startswith(f"{FITTING}.") or not path.is_file():
            continue
        found[name] = path
        waiting += imports(path, name)
    return list(found.values())


def imports(path: Path, name: str) -> frozenset[str]:
    """All that the module ``name`` in ``path`` may import, wherever in it: modules by full name,
    and whatever is taken out of one as if it were a module. Nothing where it is no Python source.
    """
    if path.suffix != ".py":
        return frozenset()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return _imports(path.read_bytes(), package)


@cache
def _imports(source: bytes, package: str) -> frozenset[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return frozenset()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            whole = ".".join([*above, *([node.module] if node.module else [])])
            found |= {whole, *(f"{whole}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def task_files(folder: str) -> str:
    """12 hex digits over the code and the settings in a folder given by ``--include_path``, but for
    hidden folders and those of runs; ``task_content`` covers the data of tasks that are scored."""
    root = path_of(folder)
    files: list[Path] = []
    for place, inner, names in os.walk(root):
        own = Path(place)
        inner[:] = [x for x in inner if not x.startswith(".") and not (own / x / "cells").is_dir()]
        files += [own / x for x in names if Path(x).suffix in {".py", ".yaml", ".yml"}]
    return _digest(files, root)


def task_content(task: Any, num_fewshot: int | None) -> dict[str, str]:
    """12 hex digits over a loaded lm-eval task, by its name: its settings, wherever they were
    included from, and the documents that it is scored on, wherever they lie; and by its name and
    ``/shots``, if there are any, those that its examples are drawn from."""
    settings = task.dump_config()
    settings["metadata"] = {**(settings.get("metadata") or {}), "config_source": None}
    own = settings.pop("num_fewshot", None)
    found = {task.task_name: _documents([settings], task.eval_docs)}
    # lm-eval's rule: a task that fixes 0 examples keeps 0.
    if own != 0 and (own if num_fewshot is None else num_fewshot):
        found[f"{task.task_name}/shots"] = _documents(task.fewshot_docs())
    return found


def _documents(*parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for each in itertools.chain(*parts):
        text = json.dumps(each, sort_keys=True, default=str)
        # What is no plain value is shown with its place in memory.
        text = re.sub(r" at 0x[0-9a-f]+", "", text) + "\n"
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:12]


def method_code(cls: type, recovered: bool = False) -> str:
    """12 hex digits over the modules of a method and of what it inherits from, what they import
    from beside them and of our methods, whole folders where a method is one (shipped weights and
    adapters included), and the files of ``dyndepth.fitting`` that any of these import;
    ``recovered``: and those of recoveries.

    One that looks others up by name is bound to all methods that come with the suite, and to all
    of ``dyndepth.fitting``. A class without a file (of a notebook, say) has a code of its own each
    time that it is defined: nobody knows what it stands on.
    """
    bases = [cls, *filter(_is_method, cls.__mro__[1:])]
    if not all(map(_has_a_file, bases)):
        return _without_file.setdefault(cls, secrets.token_hex(6))
    homes = {METHODS, *(base.__module__.split(".")[0] for base in bases)} - {PACKAGE.name}
    used = _recovering() if recovered else set()
    if any("fit" in vars(base) for base in bases):
        used.add(f"{FITTING}.fits")  # through which every fit goes
    files: dict[str, set[Path]] = {}
    own = {base.__module__ for base in bases}
    waiting = list(own)
    while waiting:
        name = waiting.pop()
        home = name in own or any(name.startswith(f"{each}.") for each in homes)
        path = _file(name) if home and name not in files else None
        if path is None:
            continue
        folder = path.parent if path.name == "__init__.py" else None
        files[name] = {path} if folder is None else {path, *_sources(folder)}
        waiting.append(name.rpartition(".")[0] if folder is None else "")
        found = imports(path, name)
        used |= found
        waiting += found
    read = {*_fitting(used)}.union(*files.values())
    if f"{PACKAGE.name}.common.registry" in used:
        read |= {*_placed(("fitting",)), *_sources(_methods_folder())}
    shipped = getattr(cls, "shipped_adapters", None)
    read |= _sources(shipped) if shipped is not None else set()
    return _digest(list(read), None)


def _is_method(cls: type) -> bool:
    """Whether a class implements the contract, and not only lends something to one that does."""
    return cls.__module__ != CONTRACT and any(each.__module__ == CONTRACT for each in cls.__mro__)


def _methods_folder() -> Path:
    place = _file(METHODS)
    assert place is not None
    return place.parent


_without_file: WeakKeyDictionary[type, str] = WeakKeyDictionary()


def _has_a_file(cls: type) -> bool:
    """Whether the source of a class is known; what runs as ``__main__`` may be a program around
    it."""
    path = _file(cls.__module__)
    if path is not None and cls.__module__ == "__main__":
        return f"class {cls.__name__}".encode() in path.read_bytes()
    return path is not None


def _file(module: str) -> Path | None:
    """Where the source of a module lies; None where there is no such module, or no file."""
    if module in sys.modules:
        place = getattr(sys.modules[module], "__file__", None)
    else:
        try:
            spec = find_spec(module)
        except (ImportError, ValueError):
            return None
        place = spec.origin if spec is not None else None
    return Path(place) if place is not None and Path(place).is_file() else None


def _recovering() -> set[str]:
    folder = PACKAGE / "fitting" / "recovery"
    return {f"{FITTING}.recovery.{path.stem}" for path in folder.glob("*.py")}


def _sources(folder: Path) -> set[Path]:
    suffixes = {".py", ".json", ".safetensors"}
    return {path for path in folder.rglob("*") if path.suffix in suffixes}


def _digest(files: list[Path], root: Path | None) -> str:
    """SHA-256 over names (relative to ``root``; bare if None) and contents, whatever the order."""
    parts = sorted(
        (str(path.relative_to(root)) if root else path.name, path.read_bytes()) for path in files
    )
    digest = hashlib.sha256()
    for name, content in parts:
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def brought_code(*owners: Any) -> str:
    """Digest of the source files that came along with the classes of ``owners``; empty if none."""
    found: list[dict[str, str]] = []
    for owner in owners:
        module = inspect.getmodule(type(owner))
        files: list[Path] = []
        if module is not None and module.__name__.startswith("transformers_modules."):
            files = sorted(Path(str(module.__file__)).parent.glob("*.py"))
        found.append({each.name: each.read_text(encoding="utf-8") for each in files})
    return facts_digest({"files": found}) if any(found) else ""


def facts_digest(facts: Mapping[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
