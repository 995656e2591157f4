"""Where in a method's own files something went wrong, for sentences that people read."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dyndepth.common.errors import MethodFault, RunFailed, UserError


def culprit(fault: BaseException) -> str:
    """``file.py:37, in gates``: the innermost line of a method's files that ``fault`` came
    through; empty if it came through none."""
    homes = _homes()
    for frame in reversed(traceback.extract_tb(fault.__traceback__)):
        file = Path(frame.filename)
        if any(_within(file, home) for home in homes):
            return f"{_short(file)}:{frame.lineno}, in {frame.name}"
    return ""


def told(fault: Exception) -> str:
    """``fault`` in one line: what it says, its kind unless it is a sentence for people, and the
    line of a method that it came from."""
    text = " ".join(str(fault).split())
    if isinstance(fault, UserError | RunFailed | MethodFault):
        return text
    place = culprit(fault)
    return f"{type(fault).__name__}: {text}" + (f" ({place})" if place else "")


def definition(function: Callable[..., Any]) -> str:
    """``Class.gates, file.py:30``: what a function is called and where it stands."""
    own = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(own, "__code__", None)
    place = f", {_short(Path(code.co_filename))}:{code.co_firstlineno}" if code else ""
    return f"{getattr(own, '__qualname__', own)}{place}"


def import_failure(fault: BaseException, module: str) -> str:
    """What the import of a method's ``module`` failed of, and where in its files:
    ``SyntaxError: ... (file.py:3)``."""
    said, place = " ".join(str(fault).split()), ""
    if isinstance(fault, SyntaxError) and fault.filename:
        said, place = fault.msg, f"{_short(Path(fault.filename))}:{fault.lineno}"
    else:
        home = _home(module)
        for frame in traceback.extract_tb(fault.__traceback__):
            if home is not None and _within(Path(frame.filename), home):
                place = f"{_short(Path(frame.filename))}:{frame.lineno}"
    return f"{type(fault).__name__}: {said}" + (f" ({place})" if place else "")


def _homes() -> set[Path]:
    """Files, or folders of packages, of all methods that were imported; not those of the harness
    itself."""
    contract: Any = sys.modules.get("dyndepth.method")
    waiting = contract.DynamicDepthMethod.__subclasses__() if contract else []
    found: set[Path] = set()
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        name = cls.__module__
        file = getattr(sys.modules.get(name), "__file__", None)
        if not name.startswith("dyndepth.") or name.startswith("dyndepth.methods."):
            homes = (_home(name), Path(file) if file is not None else None)
            found |= {home for home in homes if home is not None}
    return found


def _home(module: str) -> Path | None:
    """The file of a method's module, or the folder of the package that it is in."""
    parts = module.split(".")
    root = ".".join(parts[: 3 if parts[0] == "dyndepth" else 1])
    try:
        origin = getattr(sys.modules.get(root) or find_spec(root), "__file__", None)
        origin = origin or getattr(find_spec(root), "origin", None)
    except (ImportError, ValueError):
        return None
    if origin is None:
        return None
    return Path(origin).parent if Path(origin).name == "__init__.py" else Path(origin)


def _within(file: Path, home: Path) -> bool:
    return file == home or home in file.parents


def _short(file: Path) -> str:
    """A path from here, where it lies below."""
    try:
        return str(file.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(file)
