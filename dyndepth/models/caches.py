"""Under which names models take and return their cache."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")
"""Keywords under which forwards take their cache; transformers 5.24 renamed it to the first."""


@functools.cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    accepted = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in accepted), CACHE_ARGUMENTS[1])


def cache_argument(module: Any) -> str:
    """The keyword under which ``module.forward`` takes its cache; peft's wrapper hands it on."""
    module = module.get_base_model() if hasattr(module, "get_base_model") else module
    return _cache_argument(type(module).forward)


def cache_of(values: Mapping[str, Any]) -> Any:
    """The cache among a forward's keyword arguments, or in its output; None if there is none."""
    for name in CACHE_ARGUMENTS:
        # An output that lacks an old name warns of it when it is asked.
        found = values[name] if name in values.keys() else None  # noqa: SIM118
        if found is not None:
            return found
    return None


def cache_in(output: Any) -> Any:
    """The cache in a decoder's output, which may be a plain tuple; None if there is none."""
    if isinstance(output, Mapping):
        return cache_of(output)
    parts = output if isinstance(output, tuple) else ()
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)
