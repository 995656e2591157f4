"""A text written by a model under a method, and what writing it came to.

Stands on ``fitting`` and ``runtime``. Plots and notebooks may import it. The room has the name of
its function: ``dyndepth.generate(...)`` is ``writing.generate``, whether or not somebody imported
the room, which then stands in the function's place, and is called as it.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from dyndepth.generate.writing import generate

        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
