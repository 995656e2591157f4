"""Benchmarks of dynamic depth for decoder-only language models.

Importing the package is instant and touches neither torch nor the network: each public name is
imported from its module when it is first used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dyndepth.data.corpus import load_corpus
    from dyndepth.evaluation.evaluate import evaluate
    from dyndepth.fitting.saved import load_method
    from dyndepth.method import DynamicDepthMethod
    from dyndepth.models.loading import load_model, load_tokenizer
    from dyndepth.runtime.attach import attach
    from dyndepth.writing.generate import generate

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent


class _Beside:
    """Finds ``dyndepth.methods`` beside this folder, and nothing else that lies there."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> ModuleSpec | None:
        """As ``importlib`` asks; ``path`` is the package's own, that of no other checkout."""
        if name != f"{__name__}.methods" or path != __path__:
            return None
        return PathFinder.find_spec(name, [str(_HERE.parent)])


if not (_HERE / "methods").is_dir() and (_HERE.parent / "methods" / "__init__.py").is_file():
    # A checkout, installed or not: its methods/ lies beside this folder, not in it.
    sys.meta_path.append(_Beside)

__all__ = [
    "DynamicDepthMethod",
    "__version__",
    "attach",
    "evaluate",
    "generate",
    "load_corpus",
    "load_method",
    "load_model",
    "load_tokenizer",
]

_HOMES = {
    "DynamicDepthMethod": "dyndepth.method",
    "attach": "dyndepth.runtime.attach",
    "evaluate": "dyndepth.evaluation.evaluate",
    "generate": "dyndepth.writing.generate",
    "load_corpus": "dyndepth.data.corpus",
    "load_method": "dyndepth.fitting.saved",
    "load_model": "dyndepth.models.loading",
    "load_tokenizer": "dyndepth.models.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
